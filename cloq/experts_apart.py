"""Packed experts through the real libraries: transformers' own `from_pretrained` on a model whose experts are taken apart.

transformers fuses experts into one parameter, which no packed layer can stand for; loaded plainly, a folder with packed experts would come
out with random ones and a warning. Here the class that `from_pretrained` builds is the model's own, taken apart as soon as it is built, so
that GPTQModel's layers go in the places of the experts' linear layers and PEFT finds them by their names.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from cloq.errors import ExportError
from cloq.export.read import QuantizedFolder

_SUFFIX = "-experts-apart"

_PACKED_EXPERT = re.compile(r"\.\d+\.(gate|up|down)_proj$")


def has_packed_experts(base: Path) -> bool:
    """Whether the folder holds packed layers of single experts, which plain transformers cannot load."""
    source = QuantizedFolder(base)
    if not any(_PACKED_EXPERT.search(name) for name in source.names):
        return False
    return not source.names.isdisjoint(source.decoder().expert_layers)


def load_experts_apart(base: Path, **kwargs) -> nn.Module:
    """`AutoModelForCausalLM.from_pretrained(base, **kwargs)` with every expert's matrices as layers of their own.

    The model's configuration calls itself by another model type: transformers and PEFT have rules by type for fusing what is called like
    an expert, and there is nothing here to be fused. Raises `ExportError` for a model that comes with code of its own.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    config = AutoConfig.from_pretrained(base)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ExportError(
            f"{base} holds packed experts of a model that comes with code of its own ({config.model_type}), which cannot be loaded packed; "
            "write a dense base with cloq export --format dense"
        )
    kind = _taken_apart(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    config.model_type += _SUFFIX
    return kind.from_pretrained(base, config=config, **kwargs)


def _taken_apart(kind: type[nn.Module]) -> type[nn.Module]:
    """The class with its experts taken apart on construction, under its own name: transformers looks things up by it."""
    from cloq.models.experts import unfuse

    def __init__(self, config, *args, **kwargs):
        kind.__init__(self, config, *args, **kwargs)
        unfuse(self)

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__, "__qualname__": kind.__qualname__})

"""Quantized experts through the real libraries: transformers' own `from_pretrained`, with the experts taken apart.

transformers fuses experts into one parameter, which no packed layer can stand for and on which PEFT puts single experts' factors in a few
families only; loaded plainly, a folder with packed experts would come out with random ones and a warning. Here the class that
`from_pretrained` builds is the model's own, taken apart as soon as it is built, so that GPTQModel's layers go in the places of the experts'
linear layers and PEFT finds them by their names. A dense base is loaded first and taken apart then.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from cloq.export.read import QuantizedFolder

_SUFFIX = "-experts-apart"
_EXPERT = re.compile(r"\.\d+\.(gate|up|down)_proj$")


def names_experts(layers: Iterable[str]) -> bool:
    """Whether any of the layers is a single expert's."""
    return any(_EXPERT.search(name) for name in layers)


def load_experts_apart(base: Path, **kwargs) -> nn.Module:
    """`AutoModelForCausalLM.from_pretrained(base, **kwargs)` with every expert's matrices as layers of their own.

    The model's configuration then calls itself by another model type: transformers and PEFT have rules by type for fusing what is called
    like an expert, and there is nothing left to be fused. A model that comes with code of its own is loaded as its code has it.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    from cloq.models.experts import unfuse

    config = AutoConfig.from_pretrained(base, trust_remote_code=kwargs.get("trust_remote_code", False))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM.from_pretrained(base, **kwargs)
    if names_experts(QuantizedFolder(base).names):
        kind = _taken_apart(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
        config.model_type += _SUFFIX
        return kind.from_pretrained(base, config=config, **kwargs)
    model = unfuse(AutoModelForCausalLM.from_pretrained(base, **kwargs))
    model.config.model_type += _SUFFIX
    return model


def _taken_apart(kind: type[nn.Module]) -> type[nn.Module]:
    """The class with its experts taken apart on construction, under its own name: transformers looks things up by it."""
    from cloq.models.experts import unfuse

    def __init__(self, config, *args, **kwargs):
        kind.__init__(self, config, *args, **kwargs)
        unfuse(self)

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__, "__qualname__": kind.__qualname__})

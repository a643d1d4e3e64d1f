"""Names in the model → tensors in the files, by transformers' own rules.

A file's name may differ from the model's (a renamed module, a missing or superfluous base-model prefix), and one model tensor
may be made of many in the files or the other way round (experts stored one by one, fused in the model). The rules and the
operations are those that `from_pretrained` uses; here they are applied to one tensor at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cloq.errors import ModelError
from cloq.models.checkpoint import TensorSource

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter


@dataclass(frozen=True)
class Origin:
    """How one tensor of the model is had. target: its name in the model. sources: (pattern, name in the files), in the order in
    which the converter takes them. converter: `None` where the one source is the tensor. first: the target that the sources
    were matched with."""

    target: str
    sources: tuple[tuple[str, str], ...]
    converter: WeightConverter | None
    first: str

    def read(self, tensors: TensorSource, model: nn.Module) -> Tensor:
        """The tensor in its stored dtype. Raises `ModelError` if the sources do not fit together."""
        return self._through(tensors.read, model)

    def shape(self, tensors: TensorSource, model: nn.Module) -> tuple[int, ...]:
        """Its shape, nothing read: the converter runs on tensors without data."""
        return tuple(self._through(lambda name: torch.empty(tensors.shape(name), device="meta"), model).shape)

    def _through(self, get: Callable[[str], Tensor], model: nn.Module) -> Tensor:
        if self.converter is None:
            return get(self.sources[0][1])
        converter = copy.deepcopy(self.converter)
        for pattern, name in self.sources:
            converter.add_tensor(self.first, name, pattern, lambda name=name: get(name))
        try:
            made = converter.convert(self.first, model=model, config=model.config)[self.target]
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            names = ", ".join(name for _, name in self.sources[:3])
            raise ModelError(
                f"{self.target} cannot be made of {names}, … ({error}); the checkpoint is incomplete: fetch it again"
            ) from error
        return made[0] if isinstance(made, list) else made


def find_origins(model: nn.Module, tensors: TensorSource) -> dict[str, Origin]:
    """The origin of every tensor of the model that the files hold, by its name in the model. Tensors that the model has no use
    for are left out, as `from_pretrained` does."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

    wanted = dict(model.state_dict(keep_vars=True))
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, Origin] = {}
    collected: dict[str, list[tuple[str, str]]] = {}
    for source in sorted(tensors.names, key=dot_natural_key):  # converters stack experts in the order in which they come
        target, pattern = _target(source, renamings, converters, model.base_model_prefix, wanted)
        if target in wanted and pattern is None:
            found[target] = Origin(target, (("", source),), None, target)
        elif target in wanted:
            collected.setdefault(target, []).append((pattern, source))
    for first, sources in collected.items():
        converter = by_pattern[sources[0][0]]
        for target in _targets(first, converter):
            found.setdefault(target, Origin(target, tuple(sources), converter, first))
    return found


def _target(source: str, renamings: list, converters: list, prefix: str, wanted: dict) -> tuple[str, str | None]:
    from transformers.core_model_loading import rename_source_key

    target, pattern = rename_source_key(source, renamings, converters, prefix, wanted)
    if target not in wanted and source in wanted:  # already in the model's own terms
        return rename_source_key(source, [], [], prefix, wanted)
    return target, pattern


def _targets(first: str, converter: WeightConverter) -> Iterator[str]:
    lead = converter.target_patterns[0]
    return (first.replace(lead, target) for target in converter.target_patterns)

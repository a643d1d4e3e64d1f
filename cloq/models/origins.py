"""Names in the model → tensors in the files, by transformers' own rules.

A file's name may differ from the model's (a renamed module, a missing or superfluous base-model prefix), and one model tensor
may be made of many in the files or the other way round (experts stored one by one, fused in the model). The rules and the
operations are those that `from_pretrained` uses; here they are applied to one tensor at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from cloq.errors import ModelError
from cloq.models.checkpoint import TensorSource
from cloq.models.experts import PARTS_IN_ORDER, Slot, experts_of

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

    @property
    def direct(self) -> bool:
        """Whether the tensor is one of the files' own, under another name at most."""
        return self.converter is None

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


@dataclass(frozen=True)
class Slice:
    """How one expert's tensor is had where the files hold all experts' together, or in pieces that do not match it. target: its name in the
    model. fused: origin of the tensor for all experts. slot: where it lies there."""

    target: str
    fused: Origin
    slot: Slot
    direct: ClassVar[bool] = False

    @property
    def sources(self) -> tuple[tuple[str, str], ...]:
        return self.fused.sources

    def read(self, tensors: TensorSource, model: nn.Module) -> Tensor:
        """As of `Origin`. What the files hold is mapped into memory, so a slice of one tensor costs little more than its own size."""
        return self.slot.of(self.fused.read(tensors, model)).contiguous()

    def shape(self, tensors: TensorSource, model: nn.Module) -> tuple[int, ...]:
        return tuple(self.slot.of(torch.empty(self.fused.shape(tensors, model), device="meta")).shape)


def find_origins(model: nn.Module, tensors: TensorSource) -> dict[str, Origin | Slice]:
    """The origin of every tensor of the model that the files hold, by its name in the model. Tensors that the model has no use
    for are left out, as `from_pretrained` does.

    Experts that the model has taken apart may be in the files under their own names, under names that transformers fuses (then each is the
    one file tensor that it would have become a part of), or fused.
    """
    wanted = dict(model.state_dict(keep_vars=True))
    apart = {f"{path}.{name}" for path, experts in experts_of(model).items() for name in experts.state_dict(keep_vars=True)}
    fused = {f"{path}.{leaf}": experts for path, experts in experts_of(model).items() for leaf in experts.shapes}
    own = {name: tensor for name, tensor in wanted.items() if name in apart}
    found, left = _named_as_in_the_model(own, tensors.names, model.base_model_prefix)
    others = {name: tensor for name, tensor in wanted.items() if name not in apart} | fused
    by_rule = _by_rule(model, others, left)
    for path, experts in experts_of(model).items():
        for name, slot in experts.slots.items():
            for kind, leaf in (("weight", slot.leaf), ("bias", f"{slot.leaf}_bias")):
                target, whole = f"{path}.{name}.{kind}", by_rule.get(f"{path}.{leaf}")
                if whole is not None and leaf in experts.shapes and target not in found:
                    found[target] = _piece(target, whole, slot, experts.shapes[leaf][0]) or Slice(target, whole, slot)
    return {name: origin for name, origin in by_rule.items() if name not in fused} | found


def _named_as_in_the_model(own: dict[str, Any], names: list[str], prefix: str) -> tuple[dict[str, Origin], list[str]]:
    """Origins of those of the model's tensors that the files hold under the model's names, and the other names in the files."""
    from transformers.core_model_loading import rename_source_key

    found, left = {}, []
    for source in names:
        target, _ = rename_source_key(source, [], [], prefix, own)
        if target in own:
            found[target] = Origin(target, (("", source),), None, target)
        else:
            left.append(source)
    return found, left


_SIDE_BY_SIDE = ("MergeModulelist", "Concatenate")


def _piece(target: str, whole: Origin, slot: Slot, experts: int) -> Origin | None:
    """The one tensor in the files that became the slot's part of the whole, if the converter does no more than lay them side by side."""
    if whole.converter is None or any(type(operation).__name__ not in _SIDE_BY_SIDE for operation in whole.converter.operations):
        return None
    patterns = list(whole.converter.source_patterns)
    turn = PARTS_IN_ORDER.index(slot.part) if slot.part in PARTS_IN_ORDER else 0
    if slot.transposed or len(patterns) != (2 if slot.part in PARTS_IN_ORDER else 1):
        return None
    sources = [source for pattern, source in whole.sources if pattern == patterns[turn]]
    return Origin(target, (("", sources[slot.expert]),), None, target) if len(sources) == experts else None


def _by_rule(model: nn.Module, wanted: dict[str, Any], names: list[str]) -> dict[str, Origin]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, Origin] = {}
    collected: dict[str, list[tuple[str, str]]] = {}
    for source in sorted(names, key=dot_natural_key):  # converters stack experts in the order in which they come
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

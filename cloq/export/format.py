"""What a file format is: one way to write quantized linear layers into a model folder, and one way to read them back.

Each format lives in one file: a writer (`Format`, a frozen dataclass), a reader (`Reader`: what the real library looks for and
how it decodes), and `encode` / `decode`, an exact inverse pair.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cloq.errors import ExportError
from cloq.models import TensorSource
from cloq.types import AnyQuantizedWeight, WeightLayout

ExpertsStored = Literal["apart", "fused", "refused"]
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Contents:
    """What a folder will hold, known before any tensor is read.

    layouts: of the quantized layers by full name. dense: full names of all other linear layers, wherever they are: those left
    alone, expert routers, the head. blocks: full name of the row of blocks. dtype: of the rest of the model, as config.json has
    it.
    conv1d: layers that the model holds as transformers' Conv1D, whose dense weight is stored `(in, out)`. fused: weights that the
    files hold in pieces and the model as one, such as experts.
    """

    layouts: dict[str, WeightLayout]
    dense: tuple[str, ...]
    blocks: str
    dtype: str
    conv1d: frozenset[str] = frozenset()
    fused: tuple[str, ...] = ()


class Format(Protocol):
    """Writes.

    dtype: what everything that is not quantized is converted to; `None` leaves it as it is.
    experts: how quantized experts are written: `apart`, one layer each; `fused`, as plain transformers loads them; `refused`.
    check: refuses, with `ExportError`, contents that the format cannot hold, before anything is written.
    tensors: a layer's tensors by the suffix of their name (`qweight`, `weight`, …).
    quantization_config: what goes into config.json, or `None`.
    """

    name: ClassVar[str]
    experts: ClassVar[ExpertsStored]
    dtype: str | None

    def check(self, contents: Contents) -> None: ...

    def tensors(self, name: str, weight: AnyQuantizedWeight, contents: Contents) -> dict[str, Tensor]: ...

    def quantization_config(self, contents: Contents) -> dict[str, Any] | None: ...


class TensorSpec(NamedTuple):
    """Shape and dtypes that a stored tensor may have; a shape of `None` is any."""

    shape: tuple[int, ...] | None
    dtypes: tuple[torch.dtype, ...]


_REPEATS = re.compile(r"\\.|\[(?:\\.|[^\]])*\]|([*+{])")
"""What repeats in a pattern, outside of escapes and of sets of characters."""

MOST_REPEATS = 4


def check_pattern(pattern: str, where: str) -> re.Pattern[str]:
    """The pattern, compiled. Raises `ExportError` unless it is a regular expression that is quick to say whether a layer's name matches.

    Patterns come with other people's models, and one whose repetitions can share a name's letters among them in many ways takes for ever:
    at most `MOST_REPEATS` are taken, none of them of a group.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ExportError(f"{pattern!r} in {where} is no regular expression ({error})") from error
    repeats = [found.start() for found in _REPEATS.finditer(pattern) if found.group(1)]
    if len(repeats) > MOST_REPEATS or any(pattern[at - 1 : at] == ")" for at in repeats):
        raise ExportError(f"{pattern!r} in {where} repeats more than names of layers need, and could take for ever; write it more plainly")
    return compiled


@dataclass(frozen=True)
class StoredLayer:
    """A quantized layer as it lies in a folder. suffixes: of its tensors' names, without the dot after the layer's name."""

    name: str
    source: TensorSource
    suffixes: frozenset[str]

    def read(self, suffix: str) -> Tensor:
        return self.source.read(self._full(suffix))

    def shape(self, suffix: str) -> tuple[int, ...]:
        return self.source.shape(self._full(suffix))

    def read_all(self, specs: dict[str, TensorSpec], bits: int, group_size: int | None) -> dict[str, Tensor]:
        """The tensors that config.json promises, by suffix. bits, group_size: for the message of the `ExportError` where one has another
        shape."""
        tensors = {suffix: self.read(suffix) for suffix in specs}
        for suffix, tensor in tensors.items():
            if tuple(tensor.shape) != specs[suffix].shape:
                raise ExportError(
                    f"{self.name}.{suffix} is {tuple(tensor.shape)}, which is not what {bits} bits in groups of "
                    f"{group_size or 'a channel'} need ({specs[suffix].shape}); config.json and the tensors disagree"
                )
        return tensors

    def _full(self, suffix: str) -> str:
        if suffix not in self.suffixes:
            have = ", ".join(sorted(self.suffixes))
            raise ExportError(f"{self.name} has {have} but no {suffix}; the folder is incomplete: fetch or export it again")
        return f"{self.name}.{suffix}"


class Reader(Protocol):
    """Reads. Made from a folder's `quantization_config` by `of`, which raises `ExportError` for what cannot be read exactly.

    marker: the suffix that tells a quantized layer among the tensors of a folder.
    widths: bits per weight that layers have.
    layers: the linear layers of a model that the real library takes for quantized: it looks for their tensors and for no others.
    obstacle: why it cannot load this model with those layers quantized, `None` where it can. model needs no weights.
    specs: what it expects of a layer of shape `(out, in)`, by suffix.
    shape: `(out, in)` of a stored layer, from headers and tensors of a few bytes.
    decode: the layer as the library decodes it, before the library rounds to the precision it computes in.
    """

    marker: ClassVar[str]

    @property
    def widths(self) -> frozenset[int]: ...

    @classmethod
    def of(cls, quantization_config: dict[str, Any]) -> Reader: ...

    def layers(self, model: nn.Module) -> set[str]: ...

    def obstacle(self, model: nn.Module, layers: set[str]) -> str | None: ...

    def specs(self, name: str, shape: tuple[int, int]) -> dict[str, TensorSpec]: ...

    def shape(self, layer: StoredLayer) -> tuple[int, int]: ...

    def decode(self, layer: StoredLayer) -> AnyQuantizedWeight: ...

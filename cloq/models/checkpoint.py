"""A folder of safetensors shards, read tensor by tensor.

Only safetensors: pickled checkpoints can run code and are refused. Headers are checked when the folder is opened (a truncated
or missing shard is found before any work), values when they are read.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cloq.algebra.linalg import all_finite
from cloq.errors import ModelError
from cloq.specs import shown

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class TensorSource(Protocol):
    """Where a `Decoder` reads its weights: named tensors, one at a time. `Checkpoint` is the plain one; another may decode as
    it reads.

    names: of all tensors, as in the files. shape: without reading the tensor. read: the tensor on the CPU. fingerprint: changes
    when any tensor does. Raises `ModelError` for a name that is not there or cannot be read."""

    @property
    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Tensor: ...

    def release(self) -> None: ...

    def fingerprint(self) -> str: ...


class Checkpoint:
    """Tensors of one model folder by their names in the files.

    Raises `ModelError` on opening if there is no safetensors file, a shard named in the index is missing, a header does not
    match its file's length, or the index names a file outside the folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files: dict[str, Path] = {}
        self._open: dict[Path, object] = {}
        for path in self._shards():
            for name in self._handle(path).keys():  # noqa: SIM118 - no mapping, it has keys() alone
                self._files[name] = path

    def _shards(self) -> list[Path]:
        index = self.folder / INDEX
        if index.exists():
            try:
                names = sorted(set(json.loads(index.read_text("utf8"))["weight_map"].values()), key=str)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
                raise ModelError(f"{index} is not a valid safetensors index ({error}); fetch the model again") from error
            for name in names:
                if not isinstance(name, str) or Path(name).name != name or not name.isprintable():
                    raise ModelError(f"{index} names the shard {shown(name)}, which is not a plain file name; the checkpoint is refused")
            return [self.folder / name for name in names]
        if (self.folder / SINGLE).exists():
            return [self.folder / SINGLE]
        loose = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in self.folder.glob(pattern))
        if loose:
            raise ModelError(
                f"{self.folder} holds pickled weights ({loose[0]}), which can run code when they are read; convert them to "
                "safetensors first: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )
        raise ModelError(f"{self.folder} has no weights: neither {SINGLE} nor {INDEX} is there; fetch the whole model")

    def _handle(self, path: Path):
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except FileNotFoundError as error:
                raise ModelError(f"the shard {path.name} is missing from {self.folder}; fetch the model again") from error
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read ({error}); it is truncated or damaged: fetch it again") from error
        return self._open[path]

    def _holder(self, name: str):
        if name not in self._files:
            raise ModelError(f"{self.folder} holds no tensor {name}")
        return self._handle(self._files[name])

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the header."""
        return tuple(self._holder(name).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """The tensor in its stored dtype, on the CPU."""
        holder = self._holder(name)
        try:
            return holder.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{name} cannot be read from {self._files[name]} ({error})") from error

    def release(self) -> None:
        """Closes the files; they are opened again when something is read. Until then what was read stays mapped into memory, and
        would add up to the whole checkpoint in the course of a run."""
        self._open.clear()

    def fingerprint(self) -> str:
        """SHA-256 over every shard's header and size and a sample of its bytes: another checkpoint is noticed without reading
        all of it."""
        digest = hashlib.sha256()
        self.release()
        try:
            for path in sorted(set(self._files.values())):
                self._handle(path)  # opened anew: a shard that was cut short in the meantime is refused, not taken for another model
                self._digest(path, digest)
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error.strerror or error}); fetch the model again") from error
        return digest.hexdigest()

    @staticmethod
    def _digest(path: Path, digest: hashlib._Hash) -> None:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(length, 1 << 26)))
            for position in range(8 + length, size, max(1, (size - 8 - length) // 256)):
                file.seek(position)
                digest.update(file.read(4096))


def check_finite(tensor: Tensor, name: str) -> Tensor:
    """The tensor itself; raises `ModelError` if it holds NaN or Inf."""
    if tensor.is_floating_point() and not all_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ModelError(
            f"{name} holds {bad} NaN or Inf values of {tensor.numel()}; the checkpoint is damaged or overflowed its dtype: "
            "fetch it again, or save it from its source in bfloat16 or float32"
        )
    return tensor

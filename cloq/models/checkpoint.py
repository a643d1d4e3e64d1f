"""A folder of safetensors shards, read tensor by tensor.

Only safetensors: pickled checkpoints can run code and are refused. Headers are checked when the folder is opened (a truncated or missing
shard is found before any work), values when they are read.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cloq.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """Tensors of one model folder by their names in the files.

    Raises `ModelError` on opening if there is no safetensors file, a shard named in the index is missing, a header does not match its
    file's length, or the index names a file outside the folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files: dict[str, Path] = {}
        self._open: dict[Path, object] = {}
        for path in self._shards():
            for name in self._handle(path).keys():
                self._files[name] = path

    def _shards(self) -> list[Path]:
        index = self.folder / INDEX
        if index.exists():
            try:
                names = sorted(set(json.loads(index.read_text("utf8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
                raise ModelError(f"{index} is not a valid safetensors index ({error}); fetch the model again") from error
            for name in names:
                if Path(name).name != name:
                    raise ModelError(f"{index} names the shard {name!r}, which is not a plain file name; the checkpoint is refused")
            return [self.folder / name for name in names]
        if (self.folder / SINGLE).exists():
            return [self.folder / SINGLE]
        loose = sorted(p.name for p in self.folder.glob("*.bin"))
        if loose:
            raise ModelError(
                f"{self.folder} holds pickled weights ({loose[0]}), which can run code when they are read; convert them to safetensors "
                "first: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )
        raise ModelError(f"{self.folder} has no weights: neither {SINGLE} nor {INDEX} is there")

    def _handle(self, path: Path):
        if path not in self._open:
            if not path.exists():
                raise ModelError(f"the shard {path.name} is missing from {self.folder}; fetch the model again")
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read ({error}); it is truncated or damaged: fetch it again") from error
        return self._open[path]

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._handle(self._files[name]).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """The tensor in its stored dtype, on the CPU."""
        try:
            return self._handle(self._files[name]).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{name} cannot be read from {self._files[name]} ({error})") from error

    def element_size(self, name: str) -> int:
        return _ELEMENT_BYTES.get(self._handle(self._files[name]).get_slice(name).get_dtype(), 4)

    def fingerprint(self) -> str:
        """SHA-256 over every shard's header and size and a sample of its bytes: another checkpoint is noticed without reading all of it."""
        digest = hashlib.sha256()
        for path in sorted(set(self._files.values())):
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                digest.update(file.read(min(length, 1 << 26)))
                for position in range(8 + length, size, max(1, (size - 8 - length) // 256)):
                    file.seek(position)
                    digest.update(file.read(4096))
        return digest.hexdigest()


_ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def check_finite(tensor: Tensor, name: str) -> Tensor:
    """The tensor itself; raises `ModelError` if it holds NaN or Inf."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ModelError(f"{name} holds {bad} NaN or Inf values of {tensor.numel()}; the checkpoint is damaged or overflowed its dtype")
    return tensor

"""Where hidden states wait between their forwards: where they were made, in host memory, or on disk."""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from cloq.errors import RunError


class Waiting:
    """Where forwards leave them."""

    def keep(self, hidden: Tensor, instead_of: Tensor | None = None) -> Tensor:
        """The same values where they wait. instead_of: what was kept before them, which nobody needs any more."""
        return hidden

    def rest(self, hidden: Tensor) -> None:
        """A forward is done with what was kept."""


class InHostMemory(Waiting):
    """A GPU's in host memory that it copies from at full speed."""

    def keep(self, hidden: Tensor, instead_of: Tensor | None = None) -> Tensor:
        if hidden.device.type == "cpu":
            return hidden
        return torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=torch.cuda.is_available()).copy_(hidden)


class OnDisk(Waiting):
    """In files of a folder, mapped into memory: a forward has its own micro-batch there, the others lie on disk as far as the system has
    better use for the memory. The files have no name, so that nothing of them remains, however the process ends.

    What waits is made again in its place (`keep` with `instead_of`), so nothing but hidden states that are replaced should be kept here.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._maps: dict[int, mmap.mmap] = {}  # by the address of the tensor in it

    def keep(self, hidden: Tensor, instead_of: Tensor | None = None) -> Tensor:
        """Raises `RunError` where the disk does not hold it."""
        kept = instead_of if instead_of is not None and self._holds(instead_of) else None
        if kept is None or (kept.shape, kept.dtype) != (hidden.shape, hidden.dtype):
            kept = self._mapped(hidden)
        else:
            kept.copy_(hidden)
        self.rest(kept)
        return kept

    def rest(self, hidden: Tensor) -> None:
        if self._holds(hidden):
            self._maps[hidden.data_ptr()].madvise(mmap.MADV_DONTNEED)  # of this process alone: what was written stays

    def _holds(self, hidden: Tensor) -> bool:
        return hidden.device.type == "cpu" and hidden.data_ptr() in self._maps

    def _mapped(self, hidden: Tensor) -> Tensor:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder) as file:
                # written, not only mapped: so a full disk is an error here, and not a signal later
                file.write(hidden.detach().cpu().contiguous().view(torch.uint8).numpy())
                file.flush()
                mapped = mmap.mmap(file.fileno(), 0)
        except OSError as error:
            raise RunError(
                f"cannot keep activations in {self._folder} ({error.strerror or error}); free space there, or use --activations host or "
                "fewer --calib-samples"
            ) from error
        kept = torch.frombuffer(mapped, dtype=hidden.dtype).view(hidden.shape)
        self._maps[kept.data_ptr()] = mapped
        return kept

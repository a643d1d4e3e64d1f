"""Where hidden states wait: the same values in every place, and on disk next to nothing of memory."""

import errno
import os
import subprocess
import sys
import tempfile

import pytest
import torch

from cloq.errors import RunError
from cloq.models import InHostMemory, OnDisk, Waiting


def hidden(seed: int = 0, tokens: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_in_memory_nothing_is_copied():
    first = hidden()
    for waiting in (Waiting(), InHostMemory()):
        assert waiting.keep(first) is first and waiting.keep(first, instead_of=hidden(1)) is first
        waiting.rest(first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_disk_what_follows_takes_the_place_of_what_was(dtype, tmp_path):
    disk, expected = OnDisk(tmp_path / "new"), hidden(1, dtype=dtype)
    first = disk.keep(hidden(dtype=dtype))
    assert torch.equal(first, hidden(dtype=dtype)) and not list((tmp_path / "new").iterdir())
    other = disk.keep(hidden(2, dtype=dtype))
    second = disk.keep(expected, instead_of=first)
    assert second.data_ptr() == first.data_ptr() != other.data_ptr() and second.dtype == dtype
    for _ in range(2):
        assert torch.equal(second, expected) and torch.equal(other, hidden(2, dtype=dtype))
        disk.rest(second)
        disk.rest(other)
    assert torch.equal(disk.keep(second, instead_of=second), expected)
    longer = disk.keep(hidden(3, tokens=9, dtype=dtype), instead_of=second)
    assert torch.equal(longer, hidden(3, tokens=9, dtype=dtype)) and torch.equal(second, expected)


def test_what_others_keep_is_let_alone(tmp_path):
    mine, disk = hidden(), OnDisk(tmp_path)
    disk.rest(mine)
    kept = disk.keep(hidden(1), instead_of=mine)
    assert torch.equal(mine, hidden()) and torch.equal(kept, hidden(1))


def test_a_part_of_what_waits_is_copied_like_anything_else(tmp_path):
    """As blocks that return a view of what they are given would have it."""
    disk = OnDisk(tmp_path)
    kept = disk.keep(hidden())
    assert torch.equal(disk.keep(kept.transpose(0, 1).contiguous().transpose(0, 1), instead_of=kept), hidden())
    assert torch.equal(disk.keep(kept[1:], instead_of=kept), hidden()[1:])


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: Full())
    with pytest.raises(
        RunError, match=r"cannot keep activations in .* \(No space left on device\); free space there, or use --activations"
    ):
        OnDisk(tmp_path).keep(hidden())


def test_a_file_where_the_folder_should_be_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot keep activations"):
        OnDisk(tmp_path / "file").keep(hidden())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_on_disk_only_what_is_in_use_takes_memory(tmp_path):
    """256 MiB kept, replaced and read, 16 MiB at a time."""
    assert grown(f"OnDisk(Path({str(tmp_path)!r}))") < 80 << 20
    assert grown("Waiting()") > 240 << 20


def grown(waiting: str) -> int:
    """Bytes by which a process of its own grows. What it frees goes back to the system at once, so that the allocator's spare memory,
    which is another at each machine, does not count.
    """
    code = f"""
import torch
from pathlib import Path
from cloq.models import OnDisk, Waiting

def resident():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

waiting = {waiting}
torch.ones(1 << 22).sum()
before, most = resident(), 0
kept = [waiting.keep(torch.full((1, 1 << 10, 1 << 12), float(i))) for i in range(16)]
for i, one in enumerate(kept):
    kept[i] = waiting.keep(one + 1, instead_of=one)
    most = max(most, resident())
for i, one in enumerate(kept):
    assert float(one.mean()) == i + 1
    waiting.rest(one)
    most = max(most, resident())
print(most - before)
"""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout)

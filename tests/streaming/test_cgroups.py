"""What control groups leave of the memory: both versions, limits around the own group, files' pages that give way, and no limits."""

from pathlib import Path

import pytest
import torch

from cloq.streaming import memory
from cloq.streaming.cgroups import memory_left

MIB = 1 << 20


def second(folder: Path, limit: str, used: int, inactive: int = 0, active: int = 0, high: str = "max") -> None:
    """A group of version 2, sizes in MiB."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.high").write_text(high + "\n")
    (folder / "memory.current").write_text(f"{used * MIB}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive * MIB}\nactive_file {active * MIB}\n")


def first(folder: Path, limit: int, used: int, own_files: int, all_files: int) -> None:
    """A group of version 1, sizes in MiB: its own pages of files, and those of the groups below it too, which count."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit * MIB}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used * MIB}\n")
    counted = f"inactive_file {own_files * MIB}\ntotal_inactive_file {all_files * MIB}\ntotal_active_file 0\n"
    (folder / "memory.stat").write_text(counted)


def left(tmp_path: Path, membership: str) -> float | None:
    (tmp_path / "membership").write_text(membership)
    found = memory_left(tmp_path / "mounted", tmp_path / "membership")
    return None if found is None else found / MIB


def test_of_the_groups_around_it_the_tightest_counts(tmp_path):
    mounted = tmp_path / "mounted"
    second(mounted / "batch", "900", 0)  # bytes: full, but not this process's
    second(mounted / "slurm", str(800 * MIB), 500)
    second(mounted / "slurm/job/step", str(400 * MIB), 350, inactive=200, active=30)
    assert left(tmp_path, "0::/slurm/job/step\n") == 280
    second(mounted / "slurm", str(800 * MIB), 700, active=20)
    assert left(tmp_path, "0::/slurm/job/step\n") == 120


def test_a_container_whose_group_is_mounted_as_the_outermost(tmp_path):
    second(tmp_path / "mounted", str(512 * MIB), 112)
    assert left(tmp_path, "0::/\n") == 400
    assert left(tmp_path, "0::/docker/0123abc\n") == 400
    assert left(tmp_path, "0::/../other\n") == 400


def test_pages_of_files_give_way(tmp_path):
    """A container that has read a model is at its limit in the kernel's account."""
    second(tmp_path / "mounted", str(512 * MIB), 512, inactive=200, active=100)
    assert left(tmp_path, "0::/\n") == 300


def test_where_the_kernel_slows_a_group_down_is_a_limit(tmp_path):
    second(tmp_path / "mounted", "max", 100, high=str(300 * MIB))
    assert left(tmp_path, "0::/\n") == 200


def test_never_below_nothing(tmp_path):
    second(tmp_path / "mounted", str(512 * MIB), 513)
    assert left(tmp_path, "0::/\n") == 0


def test_the_first_version(tmp_path):
    membership = "9:cpu,cpuacct:/a\n4:memory:/a/b\n0::/elsewhere\n"
    first(tmp_path / "mounted/memory/a", 1000, 800, own_files=0, all_files=50)
    first(tmp_path / "mounted/memory/a/b", (1 << 43) - 1, 800, own_files=0, all_files=0)  # what no limit looks like there
    assert left(tmp_path, membership) == 250


@pytest.mark.parametrize("membership", ["0::/\n", "", "4:memory:/a\n", "0::/gone\n"])
def test_without_a_limit(membership, tmp_path):
    second(tmp_path / "mounted", "max", 100)
    assert left(tmp_path, membership) is None


def test_where_there_are_no_groups(tmp_path):
    assert memory_left(tmp_path, tmp_path / "membership") is None


def test_a_group_that_says_nothing_of_use_is_none(tmp_path):
    second(tmp_path / "mounted", "many", 100)
    assert left(tmp_path, "0::/\n") is None
    second(tmp_path / "mounted", str(MIB), 100)
    (tmp_path / "mounted/memory.stat").unlink()
    assert left(tmp_path, "0::/\n") is None


def test_what_is_free_is_no_more_than_a_group_leaves(monkeypatch):
    host = memory.free_memory(torch.device("cpu"))
    if host is None:
        pytest.skip("reads /proc/meminfo")
    monkeypatch.setattr(memory, "memory_left", lambda: 6 * MIB)
    assert memory.free_memory(torch.device("cpu")) == 6 * MIB and memory.free_memory(torch.device("cpu"), processes=3) == 2 * MIB
    assert memory.spare_memory(torch.device("cpu")) == 1.5 * MIB
    monkeypatch.setattr(memory, "memory_left", lambda: 1 << 62)
    assert MIB < memory.free_memory(torch.device("cpu")) < 1 << 50

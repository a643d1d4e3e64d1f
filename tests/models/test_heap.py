"""Memory of a streamed model: what was freed has left the process."""

import subprocess
import sys

import pytest

CODE = """
import torch
from cloq.models.heap import trim_heap

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

before, kept = resident(), []
for size in range(200, 1200, 10):  # growing sizes between small things that stay, as weights and what surrounds them
    large = [torch.ones(size * 256) for _ in range(4)]
    kept.append(torch.ones(300))
    del large
fragmented = resident() - before
trim_heap()
print(fragmented, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of memory")
def test_freed_tensors_leave_the_process():
    said = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    _, after = map(int, said.split())
    assert after < 2048  # KiB: a hundred small tensors, and what the allocator keeps for itself

"""Memory of a streamed model: what was freed has left the process."""

import subprocess
import sys

import pytest

from cloq.models.heap import _trim

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
{then}
print(resident() - before)
"""


def growth(then: str) -> int:
    """KiB that a process with a hundred small tensors has more than before it had made them and many large ones."""
    code = CODE.replace("{then}", then)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux" or not _trim(), reason="about glibc's heap, by Linux's account of memory")
def test_freed_tensors_leave_the_process():
    assert 8 * growth("trim_heap()") < growth("")

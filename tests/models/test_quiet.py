"""Silence is chosen, never imposed."""

from __future__ import annotations

import subprocess
import sys

WATCH = """
import logging, os, sys
def state():
    names = ("torchao", "bitsandbytes", "torch.utils._pytree", "transformers")
    return [logging.getLogger(name).level for name in names], os.environ.get("TRANSFORMERS_VERBOSITY")
before = state()
"""


def run(code: str, tmp_path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path.parent)


def test_import_changes_nothing(tmp_path):
    done = run(
        WATCH + "import cloq, cloq.models.quiet\nassert state() == before, state()\nassert 'transformers' not in sys.modules",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_loading_a_model_says_nothing(tmp_path):
    from tests.tiny import save_tiny

    folder = save_tiny("llama", tmp_path)
    code = f"""
from cloq.models import quiet_libraries
quiet_libraries()
from transformers import AutoModelForCausalLM
from cloq.models import Decoder
import accelerate.utils, importlib, importlib.util, peft, torch
for library in ("bitsandbytes", "gptqmodel"):
    if importlib.util.find_spec(library):
        importlib.import_module(library)
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
model.save_pretrained({str(tmp_path / "again")!r})
print(len(Decoder({str(folder)!r}).enter(torch.arange(12).view(2, 6), 6)))
"""
    done = run(code, tmp_path)
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (0, "2", "")

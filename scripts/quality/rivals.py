"""Bases and factors that other libraries make, from the 16-bit model to the last factor, with what they have for it.

`gptqmodel-eora`: GPTQModel's GPTQ, asymmetric as cloq's and with the ranges' scales (it searches none), and its EoRA adapter, on the very
tokens that cloq draws; in a process of its own with a time limit, in the precision that it chooses (on a CPU bfloat16, weights and factors
too). The base is an ordinary GPTQ v2 folder.

`peft-loftq`: PEFT's `init_lora_weights="loftq"` with the five rounds of LoftQ's paper (PEFT's default is one). PEFT has it for 4 bits (NF4)
and 8, not below, and packs nothing: what it leaves in the model, and what is kept here, are the NF4 codes' decoded values in float32.

AutoRound's codes (for bench_autoround.py): its defaults but for the number of steps, on the very tokens that cloq draws, by the Python of
an environment of its own; an ordinary GPTQ folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from quality.protocol import Protocol

LOFTQ_ROUNDS = 5
_MADE_WITH = "made_with.json"


class Refused(Exception):
    """Another library does not give what it was asked for; one line that says why."""


def gptqmodel_eora(protocol: Protocol, bits: int, out: Path, minutes: float) -> Path:
    """`out/model` and `out/adapter`. Raises `Refused` if GPTQModel is not done in time, or fails."""
    asked = {
        "bits": bits, "group-size": protocol.group_size, "rank": protocol.rank, "calib": protocol.calibration_text,
        "samples": protocol.calib_samples, "seq-len": protocol.calib_len,
    }  # fmt: skip
    asked |= {"seed": protocol.calib_seed} if protocol.calib_seed else {}
    flags = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
    script = Path(__file__).parents[1] / "bench_gptqmodel.py"

    def make(folder: Path) -> None:
        command = [sys.executable, str(script), protocol.model, *flags, "--eval", protocol.test, "--child", "gptqmodel+eora"]
        run_limited([*command, "--out", str(folder)], out.with_suffix(".log"), minutes)

    return _kept(out, asked | {"model": protocol.model}, make)


def autoround_codes(protocol: Protocol, bits: int, iters: int, python: str, out: Path, minutes: float) -> Path:
    """`out/model`, and what it cost in `out/cost.json`. Raises `Refused` if AutoRound is not done in time, or fails."""
    settings = {"bits": bits, "group-size": protocol.group_size, "iters": iters}
    tokens = {"calib": protocol.calibration_text, "samples": protocol.calib_samples, "seq-len": protocol.calib_len}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]

    def make(folder: Path) -> None:
        from safetensors.torch import save_file

        from cloq.calibration import calibration_tokens
        from cloq.models import load_tokenizer
        from cloq.specs import CalibSpec

        spec, drawn = CalibSpec(*tokens.values()), folder / "tokens.safetensors"
        save_file({"tokens": calibration_tokens(spec, load_tokenizer(Path(protocol.model))).calibration}, drawn)
        script = Path(__file__).parent / "autoround_codes.py"
        run_limited([python, str(script), protocol.model, str(drawn), str(folder), *flags], out.with_suffix(".log"), minutes)

    return _kept(out, settings | tokens | {"model": protocol.model}, make)


def run_limited(command: list[str], log: Path, minutes: float) -> None:
    """A command with all its output in `log`. Raises `Refused` with the last that it said, if it fails or takes longer."""
    from bench_gptqmodel import ENVIRONMENT

    with log.open("w") as output:
        try:
            subprocess.run(command, env=os.environ | ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT, timeout=60 * minutes, check=True)
        except subprocess.TimeoutExpired as error:
            raise Refused(f"not done within {minutes:g} minutes, {log} says how far it came") from error
        except subprocess.CalledProcessError as error:
            said = [line.strip() for line in log.read_text("utf8", "replace").splitlines() if line.strip()]
            raise Refused(f"ended with status {error.returncode}: {said[-1] if said else 'no word'}") from error


def peft_loftq(protocol: Protocol, out: Path) -> Path:
    """`out/model` and `out/adapter`. Raises `Refused` for a rank that PEFT's LoftQ does not have, or without bitsandbytes."""
    asked = {"model": protocol.model, "rank": protocol.rank, "rounds": LOFTQ_ROUNDS}
    return _kept(out, asked, lambda folder: _loftq(protocol.model, protocol.rank, folder))


def _loftq(source: str, rank: int, folder: Path) -> None:
    from peft import LoftQConfig, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from cloq.models import Decoder, linear_shape, locate

    model = AutoModelForCausalLM.from_pretrained(locate(source), dtype=torch.float32)
    linears = Decoder(locate(source)).all_linears()
    smallest = min(min(linear_shape(model.get_submodule(name))) for name in linears)
    if rank > smallest:
        raise Refused(f"PEFT's LoftQ makes no factors of rank {rank} for layers of {smallest}")
    targets = sorted({name.rsplit(".", 1)[-1] for name in linears})
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM",
        init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4, loftq_iter=LOFTQ_ROUNDS),
    )  # fmt: skip
    try:
        with _without_gpu():
            made = get_peft_model(model, config)
    except (ValueError, RuntimeError, ImportError) as error:
        raise Refused(f"PEFT's LoftQ: {str(error).splitlines()[0]}") from error
    stated = made.peft_config["default"]
    stated.init_lora_weights, stated.loftq_config = True, {}  # any name would make PEFT alternate again when it loads
    made.save_pretrained(folder / "adapter")
    made.unload().save_pretrained(folder / "model")


class _CpuForCuda(TorchFunctionMode):
    """Tensors that are sent to the GPU stay where they are."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.to:
            args, kwargs = tuple(map(self._here, args)), {key: self._here(value) for key, value in kwargs.items()}
        return function(*args, **kwargs)

    @staticmethod
    def _here(value: Any) -> Any:
        return "cpu" if isinstance(value, (str, torch.device)) and torch.device(value).type == "cuda" else value


@contextmanager
def _without_gpu() -> Iterator[None]:
    """PEFT's LoftQ names the device `cuda` by hand; bitsandbytes quantizes to NF4 on a CPU just as well."""
    if torch.cuda.is_available():
        yield
        return
    with _CpuForCuda():
        yield


def _kept(out: Path, asked: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """The folder that `make` filled, once. Raises `SystemExit` if it was filled by other settings."""
    if not out.exists():
        partial = out.with_name(f"{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        make(partial)
        (partial / _MADE_WITH).write_text(json.dumps(asked, indent=1), "utf8")
        partial.replace(out)
    made_with = json.loads((out / _MADE_WITH).read_text("utf8"))
    if made_with != asked:
        raise SystemExit(f"{out} was made with other settings ({made_with}, not {asked}); use another --out")
    return out

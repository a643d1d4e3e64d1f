"""The main job as one function: from a model's name to a folder with a packed base, an adapter and a report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloq.errors import SpecError
from cloq.specs import RunSpec, run_spec
from cloq.types import LayerMetrics

Emit = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class RunResult:
    """A finished run. layers: metrics by full layer name. seconds: of this call. phases: seconds by phase."""

    out: Path
    spec: RunSpec
    layers: dict[str, LayerMetrics]
    seconds: float
    phases: dict[str, float]

    @property
    def model(self) -> Path:
        return self.out / "model"

    @property
    def adapter(self) -> Path:
        return self.out / "adapter"


def quantize(model: str, *, out: str | Path, restart: bool = False, emit: Emit | None = None, format: str | None = None, **settings) -> RunResult:
    """Quantizes a model and initialises its adapters: `cloq.quantize("org/model", bits=2, rank=64, calib="wikitext2", out="out")`.

    settings: as on the command line, with underscores: `bits`, `group_size`, `rank`, `init`, `calib`, `calib_samples`, `seq_len`, `magr`,
    `only`, `skip`, `propagate`, `seed`, `device`, … (`cloq.specs.FLAT` lists them). Raises a `CloqError` for anything that a user can mend.
    """
    return run(run_spec(model=model, **settings), out, restart=restart, emit=emit, form=format)


def run(spec: RunSpec, out: str | Path, *, restart: bool = False, emit: Emit | None = None, form: str | None = None) -> RunResult:
    """Executes or continues a run. form: of the base in `out/model`; by default `gptq`, or `nf4` after that quantizer."""
    from cloq import pipeline
    from cloq.calibration import draw_sequences, documents
    from cloq.export import FORMATS, write_adapter, write_model
    from cloq.models import Decoder, load_tokenizer, locate
    from cloq.store import Store

    emit = emit or (lambda event, values: None)
    phases: dict[str, float] = {}

    def tee(event: str, values: dict[str, Any]) -> None:
        if event == "phase":
            phases[values["phase"]] = phases.get(values["phase"], 0.0) + values["seconds"]
        emit(event, values)

    started = time.perf_counter()
    form = form or ("nf4" if spec.quant.quantizer == "nf4" else "gptq")
    if form not in FORMATS:
        raise SpecError(f"unknown format {form!r}; allowed: {', '.join(FORMATS)}")
    folder = locate(spec.model, spec.revision)
    decoder = Decoder(folder, pipeline.resolve_device(spec.device), trust_remote_code=spec.trust_remote_code)
    tokenizer = load_tokenizer(folder, spec.trust_remote_code)
    tokens = draw_sequences(documents(spec.calib.source), tokenizer, spec.calib)
    store = Store(out)
    with store.lock():
        pipeline.quantize_blocks(spec, decoder, tokens, store, tee, restart)
        exporting = time.perf_counter()
        write_model(decoder, store, FORMATS[form](), store.out / "model")
        names = [name for index in range(len(decoder.blocks)) for name in decoder.linears(index)]
        write_adapter(store, str((store.out / "model").resolve()), names, store.out / "adapter")
        tee("phase", {"phase": "export", "seconds": time.perf_counter() - exporting})
    layers = {name: summary.metrics for name, summary in store.summaries().items()}
    return RunResult(store.out, spec, layers, time.perf_counter() - started, phases)

"""The main jobs as functions: from a model's name to a folder with a packed base, an adapter and a report.

OUT/model/     the packed base, an ordinary Hugging Face folder
OUT/adapter/   the factors, an ordinary PEFT folder
OUT/run.yaml   every setting and version; `cloq quantize --config OUT/run.yaml` repeats the run
OUT/report.json, report.html, layers.csv, README.md
OUT/.cloq/     finished blocks, from which any export is made
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cloq import __version__
from cloq.errors import RunError, SpecError
from cloq.specs import RunSpec, Spec, run_spec
from cloq.streaming.distributed import ALONE, Processes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cloq.calibration import CalibrationTokens
    from cloq.models import Decoder
    from cloq.report import Report
    from cloq.streaming.store import LayerSummary
    from cloq.use.evaluate import Quality

Emit = Callable[[str, dict[str, Any]], None]
Progress = Callable[[str, int, int], None]
RUN_FILE = "run.yaml"
AnySpec = TypeVar("AnySpec", bound=Spec)


@dataclass(frozen=True)
class RunResult:
    """A finished run. layers: layout and metrics by full layer name. seconds: of this call. phases: seconds by phase.
    base: the folder of the quantized base, `out/model` or the one that was given. report: what report.json says."""

    out: Path
    spec: RunSpec
    layers: dict[str, LayerSummary]
    seconds: float
    phases: dict[str, float]
    base: Path
    report: Report | None = None

    @property
    def adapter(self) -> Path:
        return self.out / "adapter"


def quantize(
    model: str, *, out: str | Path, restart: bool = False, emit: Emit | None = None, format: str | None = None, **settings
) -> RunResult:
    """Quantizes a model and initialises its adapters: `cloq.quantize("org/model", bits=2, rank=64, calib="wikitext2", out="out")`.

    settings: as on the command line, with underscores: `bits`, `group_size`, `rank`, `init`, `calib`, `calib_samples`, `seq_len`, `magr`,
    `only`, `skip`, `propagate`, `seed`, `device`, … (`cloq.specs.FLAT` lists them). Raises a `CloqError` for anything that a user can mend.

    In each of several processes started by `torchrun` the same call takes its share of the work; the first one writes and emits, and all
    return the same result.
    """
    return run(run_spec(model=model, **settings), out, restart=restart, emit=emit, form=format)


def run(spec: RunSpec, out: str | Path, *, restart: bool = False, emit: Emit | None = None, form: str | None = None) -> RunResult:
    """Executes or continues a run. form: of the base in `out/model`; by default `gptq`, or `nf4` after that quantizer."""
    processes = Processes.start()
    with processes.together(), contextlib.ExitStack() as held:
        return _run(spec, Path(out), restart, emit if processes.first else None, form, processes, held)


def _run(
    spec: RunSpec, out: Path, restart: bool, emit: Emit | None, form: str | None, processes: Processes, held: contextlib.ExitStack
) -> RunResult:  # fmt: skip
    """held: closed behind the run."""
    from cloq.export import FORMATS, check_format, write_adapter, write_model
    from cloq.models import locate
    from cloq.report import write_report
    from cloq.streaming.layers import foreseen, plan_layers, predicted_layouts
    from cloq.streaming.manifest import versions
    from cloq.streaming.pipeline import quantize_blocks
    from cloq.streaming.store import Store
    from cloq.use.given import open_given

    phases: dict[str, float] = {}

    def tee(event: str, values: dict[str, Any]) -> None:
        if event == "phase":
            phases[values["phase"]] = phases.get(values["phase"], 0.0) + values["seconds"]
        if emit is not None:
            emit(event, values)

    started = time.perf_counter()
    form = form or ("nf4" if spec.quant.quantizer == "nf4" else "gptq")
    if form not in FORMATS:
        raise SpecError(f"unknown format {form!r}; allowed: {', '.join(FORMATS)}")
    decoder = processes.after_first(lambda: open_decoder(spec, processes))
    decoder.check_streamable()  # encoders and what cannot be streamed, before any text is read
    given = processes.after_first(lambda: open_given(locate(spec.quantized), decoder, spec.trust_remote_code) if spec.quantized else None)
    if given is None:
        layers = foreseen(spec, plan_layers(spec, decoder), decoder)
        check_format(decoder, predicted_layouts(layers, decoder), FORMATS[form]())
    store = Store(out)
    processes.on_first(store.refuse_foreign)
    tokens = processes.on_first(lambda: draw_tokens(spec, decoder))
    processes.on_first(lambda: held.enter_context(store.lock()))
    quantize_blocks(spec, decoder, tokens, store, tee, restart=restart, given=given, processes=processes)
    peaks = processes.gather(peak_memory(decoder.device))
    base = given.folder.resolve() if given else (store.out / "model").resolve()

    def export() -> RunResult:
        exporting = time.perf_counter()
        if given is None:
            write_model(decoder, store, FORMATS[form](), store.out / "model")
        scale = spec.lora.scale_on(given=given is not None)
        write_adapter(store, str(base), decoder.all_linears(), store.out / "adapter", scale)
        write_run_file(spec, store.out)
        tee("phase", {"phase": "export", "seconds": time.perf_counter() - exporting})
        result = RunResult(store.out, spec, store.summaries(), time.perf_counter() - started, phases, base)
        report = _report(result, decoder, None if given else form, versions(), peaks)
        write_report(store.out, report)
        return dataclasses.replace(result, report=report)

    return processes.on_first(export)


def open_decoder(spec: RunSpec, processes: Processes = ALONE) -> Decoder:
    """The model that a run starts from, without any weight read, on this process's device."""
    from cloq.models import Decoder, locate
    from cloq.streaming.device import resolve_device

    device = processes.device(resolve_device(spec.device))  # before the model: a missing GPU should be said at once
    return Decoder(locate(spec.model, spec.revision), device, trust_remote_code=spec.trust_remote_code)


def draw_tokens(spec: RunSpec, decoder: Decoder) -> CalibrationTokens:
    """The run's calibration and held-out tokens."""
    from cloq.calibration import calibration_tokens
    from cloq.models import load_tokenizer, sample_text

    def sample(sequences: int, seq_len: int, seed: int):
        return sample_text(decoder.folder, sequences, seq_len, seed, str(decoder.device))

    tokenizer = load_tokenizer(decoder.folder, spec.trust_remote_code)
    return calibration_tokens(spec.calib, tokenizer, sample_text=sample, max_positions=decoder.max_positions)


def evaluate_tokens(
    out: str | Path, tokens: Tensor, text: str, *, dense: bool = True, device: str = "auto", progress: Progress | None = None
) -> list[Quality]:  # fmt: skip
    """Perplexities of the 16-bit model (where `dense`), the base alone, and the base with its adapter, on `tokens (sequences, length)`.

    Base and adapter are read from the exported files as they decode, not from the store. text: what the report calls the tokens. The
    16-bit model is the one in the run file.
    """
    from cloq.export.peft import AdapterFolder
    from cloq.export.read import QuantizedFolder
    from cloq.report import add_quality
    from cloq.streaming.device import resolve_device
    from cloq.use.evaluate import Quality, perplexity

    out, device = Path(out), resolve_device(device)
    spec = read_run_file(out / RUN_FILE)
    folder = _base_folder(out)
    base = QuantizedFolder(folder).decoder(device)
    add_adapter = AdapterFolder(out / "adapter").added_to(base)

    models = [("base", base, None), ("base + adapter", base, add_adapter)]
    if dense:
        models.insert(0, ("16-bit", open_decoder(spec.replace(device=device)), None))
    found = []
    for name, decoder, set_weights in models:
        count = (lambda done, total, name=name: progress(name, done, total)) if progress else None
        measured = perplexity(decoder, tokens, set_weights=set_weights, progress=count)
        found.append(Quality(name, measured.value, measured.tokens, measured.stderr, measured.protocol, text))
    add_quality(out, found)
    return found


def _base_folder(out: Path) -> Path:
    from cloq.models import locate

    spec = read_run_file(out / RUN_FILE)
    return locate(spec.quantized) if spec.quantized else out / "model"


def export(out: str | Path, form: str, target: str | Path | None = None) -> Path:
    """Writes a finished run's base in another format, by default into `out/model-FORMAT`. `ExportError` if that cannot hold it."""
    from cloq.export import FORMATS, write_model
    from cloq.export.folder import ANOTHER_TARGET
    from cloq.streaming.store import Store

    if form not in FORMATS:
        raise SpecError(f"unknown format {form!r}; allowed: {', '.join(FORMATS)}")
    store = Store(out)
    store.manifest()
    spec = read_run_file(store.out / RUN_FILE)
    return write_model(
        open_decoder(spec.replace(device="cpu")), store, FORMATS[form](), Path(target or store.out / f"model-{form}"), ANOTHER_TARGET
    )


def export_one_rank(out: str | Path, adapter: str | Path | None = None, target: str | Path | None = None) -> Path:
    """Writes a run's adapter, or another one, with one rank for all layers, by default into `out/adapter-one-rank`: the same products, for
    servers that read no `rank_pattern`. `ExportError` for what is no plain LoRA, and for a `target` with other content."""
    from cloq.export import write_one_rank
    from cloq.export.peft import AdapterFolder

    usual = Path(out) / "adapter-one-rank"
    return write_one_rank(AdapterFolder(adapter or Path(out) / "adapter"), Path(target or usual), own=target is None)


def write_run_file(spec: RunSpec, out: Path) -> None:
    """Everything that repeats the run: settings (local paths made absolute), seed among them, and the versions it ran with."""
    absolute = {key: str(Path(value).resolve()) for key in ("model", "quantized") if (value := getattr(spec, key)) and Path(value).exists()}
    write_settings(spec.replace(**absolute), out / RUN_FILE)


def write_settings(spec: Spec, path: Path) -> None:
    """A file that `read_settings` reads: settings, and the versions they were used with."""
    import yaml

    from cloq.streaming.manifest import versions
    from cloq.streaming.store import write_atomically, writing

    content = {"cloq": __version__, "settings": spec.to_dict(), "versions": versions()}
    with writing(path.parent):
        write_atomically(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())


def read_run_file(path: Path) -> RunSpec:
    """The settings in a run.yaml. Errors as of `read_settings`."""
    return read_settings(path, RunSpec, "cloq quantize")


def read_settings(path: Path, kind: type[AnySpec], maker: str) -> AnySpec:
    """The spec that a file of settings holds. maker: the command that writes such files, for messages.

    Raises `RunError` if there is no file, `SpecError` with the file's name for anything that is not such a file.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text("utf8"))
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist; a finished run has one ({maker} writes it)") from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: no UTF-8, no such date, a number too long
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SpecError(f"{path} cannot be read as a run file ({reason})") from error
    if not isinstance(values, dict) or not isinstance(values.get("settings"), dict):
        raise SpecError(f"{path} is not a run file: it needs a mapping `settings`, as in the {path.name} that {maker} writes")
    try:
        return kind.from_dict(values["settings"])
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error


def _report(result: RunResult, decoder: Decoder, form: str | None, versions: dict[str, str], peaks: list[dict[str, int]]) -> Report:
    """What the finished run is worth telling; numbers that an earlier report of the same result has are kept. peaks: of all processes."""
    from cloq.quantizers.columns import why_plainly
    from cloq.report import Report, carry_over, weight_bytes

    sizes = {"original": weight_bytes(decoder.folder), "base": weight_bytes(result.base), "adapter": weight_bytes(result.adapter)}
    now = peak_memory(decoder.device)
    notes = [f"The work was shared by {len(peaks)} processes; the peak memory is that of the largest."] if len(peaks) > 1 else []
    if why := why_plainly(decoder.device):
        notes.append(f"The loops over columns ran as single operations on the GPU, which takes longer: {why}.")
    report = Report(
        result.spec, result.layers, result.seconds, result.phases,
        form=form, sizes=sizes, peak_memory={kind: max(peak[kind] for peak in (*peaks, now)) for kind in now}, versions=versions,
        notes=tuple(notes),
    )  # fmt: skip
    return carry_over(result.out, report)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes: the process's largest resident set, and what torch held at most on the GPU."""
    import torch

    from cloq.streaming.memory import peak_resident

    peak = {"host": peak_resident()}
    return peak | ({"device": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {})

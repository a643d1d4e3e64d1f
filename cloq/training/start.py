"""Where a training starts: a base and an adapter that belong together, and the model made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from cloq.api import RUN_FILE, read_run_file
from cloq.errors import TrainingError
from cloq.export.peft import AdapterFolder
from cloq.export.read import QuantizedFolder, read_config, reader_of
from cloq.models import load_config, max_positions
from cloq.report import REPORT_FILE, read_report
from cloq.streaming.manifest import versions
from cloq.training.spec import TrainSpec
from cloq.use.check import check_adapter
from cloq.use.loading import require_libraries
from cloq.use.pairing import base_folder, refuse_another_base


@dataclass(frozen=True)
class Start:
    """base: folder. fingerprint: of its tensors. max_positions: the longest sequence that the model takes, where it says so."""

    base: Path
    adapter: AdapterFolder
    fingerprint: str
    max_positions: int | None
    versions: dict[str, str]


def find_start(spec: TrainSpec) -> Start:
    """Finds base and adapter, from their files alone.

    Raises `TrainingError` if there is no finished run, or the adapter does not fit the base; `ExportError` if it says that it was made for
    another, or one of the two is damaged.
    """
    adapter, base = _folders(spec)
    require_libraries(base)
    wrong = [finding.what for finding in check_adapter(adapter, base) if not finding.ok]
    if wrong:
        raise TrainingError(f"{adapter.folder} does not fit the base in {base}: {wrong[0]}")
    if not spec.base:
        refuse_another_base(adapter, base, Path(spec.run))
    fingerprint = QuantizedFolder(base).fingerprint()
    limit = max_positions(load_config(base, spec.trust_remote_code))
    return Start(base.resolve(), adapter, fingerprint, limit, versions())


def _folders(spec: TrainSpec) -> tuple[AdapterFolder, Path]:
    run = Path(spec.run)
    if not spec.run or not run.is_dir():
        raise TrainingError(f"there is no folder {spec.run or '(none was named)'}; name that of a finished run: cloq train OUT --data ROWS")
    if not spec.adapter and not (run / "adapter").is_dir():
        raise TrainingError(f"{run} has no adapter; it is not a finished run (run cloq quantize to its end), or name one with --adapter")
    adapter = AdapterFolder(spec.adapter or run / "adapter")
    return adapter, Path(spec.base) if spec.base else base_folder(run, adapter)


def lowest_width(spec: TrainSpec) -> int | None:
    """The lowest width of the base's layers: as its format has them, or of a dense export as the run says that made it. `None` for a base
    that is not there, or of which nothing says how it was quantized. Errors as of `find_start`."""
    base = Path(spec.base) if spec.base else _folders(spec)[1]
    if not (base / "config.json").is_file():
        return None
    quantization = read_config(base).get("quantization_config")
    if quantization:
        return min(reader_of(quantization).widths)
    run = next((out for out in (base.parent, Path(spec.run)) if (out / REPORT_FILE).is_file() or (out / RUN_FILE).is_file()), None)
    return None if run is None else _width_in(run)


def _width_in(run: Path) -> int:
    """Of the layers in its report, where it still has one: means, rules and given bases make other widths than the settings say."""
    if (run / REPORT_FILE).is_file():
        return min(bits for bits, _ in read_report(run).grids())
    return read_run_file(run / RUN_FILE).quant.bits


def prepare(model: nn.Module, spec: TrainSpec) -> nn.Module:
    """The loaded model ready to train: dropout in its adapter, no cache, and gradients for the factors alone, which is checked."""
    from peft.tuners.lora import LoraLayer

    model.config.use_cache = False
    model.peft_config[model.active_adapter].lora_dropout = spec.dropout
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_dropout[model.active_adapter] = nn.Dropout(spec.dropout) if spec.dropout else nn.Identity()
    if spec.gradient_checkpointing:
        model.enable_input_require_grads()  # nothing else below the first factors has a gradient, and then no block would be run again
        model.gradient_checkpointing_enable({"use_reentrant": False})
    refuse_frozen(model)
    return model


def refuse_frozen(model: nn.Module) -> None:
    """Raises `TrainingError` unless exactly the factors have gradients, and there are some."""
    factors = {name for name, _ in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise TrainingError("the adapter was loaded frozen: nothing would train; load it with cloq.load(..., trainable=True)")
    if trainable != factors:
        odd = sorted(trainable ^ factors)[0]
        state = "has a gradient and is no factor" if odd in trainable else "is a factor and has no gradient"
        raise TrainingError(f"{odd} {state}; only an adapter's factors train, and all of them do")

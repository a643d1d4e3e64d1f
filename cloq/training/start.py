"""Where a training starts: a base and an adapter that belong together, and the model made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from cloq.check import check_adapter
from cloq.errors import TrainingError
from cloq.export.peft import AdapterFolder
from cloq.export.read import QuantizedFolder, read_config
from cloq.loading import require_libraries
from cloq.pipeline import versions
from cloq.store import Store
from cloq.training.spec import TrainSpec


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

    Raises `TrainingError` if there is no finished run, or the adapter was not made for this base; `ExportError` if one of the two is
    damaged.
    """
    run = Path(spec.run)
    if not spec.run or not run.is_dir():
        raise TrainingError(f"there is no folder {spec.run or '(none was named)'}; name that of a finished run: cloq train OUT --data ROWS")
    if not spec.adapter and not (run / "adapter").is_dir():
        raise TrainingError(f"{run} has no adapter; it is not a finished run (run cloq quantize to its end), or name one with --adapter")
    adapter = AdapterFolder(spec.adapter or run / "adapter")
    base = _base(spec, run, adapter)
    require_libraries(base)
    source = QuantizedFolder(base)
    fingerprint = source.fingerprint()
    wrong = [finding.what for finding in check_adapter(adapter, base) if not finding.ok]
    if wrong:
        raise TrainingError(f"{adapter.folder} does not fit the base in {base}: {wrong[0]}")
    if not _belongs(adapter, base, fingerprint, run):
        raise TrainingError(
            f"{adapter.folder} was made for the base in {adapter.config.get('base_model_name_or_path')}, not for the one in {base}, whose "
            "errors it would not undo. Name that one with --base; or, if this is the same base in another place, correct "
            "base_model_name_or_path in adapter_config.json"
        )
    return Start(base.resolve(), adapter, fingerprint, read_config(base).get("max_position_embeddings"), versions())


def _base(spec: TrainSpec, run: Path, adapter: AdapterFolder) -> Path:
    if spec.base:
        return Path(spec.base)
    stated = adapter.config.get("base_model_name_or_path")
    return run / "model" if (run / "model" / "config.json").is_file() or not stated else Path(stated)


def _belongs(adapter: AdapterFolder, base: Path, fingerprint: str, run: Path) -> bool:
    """The adapter names this base, or one that is the same byte for byte, or lies beside it with the factors that its run fitted."""
    stated = Path(str(adapter.config.get("base_model_name_or_path")))
    if stated.resolve() == base.resolve():
        return True
    if (stated / "config.json").is_file():
        return QuantizedFolder(stated).fingerprint() == fingerprint
    beside = adapter.folder.resolve().parent == run.resolve() == base.resolve().parent
    return beside and all(_fitted_here(adapter, run))


def _fitted_here(adapter: AdapterFolder, run: Path) -> Iterator[bool]:
    """For each layer of the run's first stored block, whether the adapter has the factors that are stored there."""
    store = Store(run)
    for name, result in store.read(0).items() if store.finished() else ():
        found = adapter.read(name)
        yield name in adapter.names and found.A.shape == result.factors.A.shape and bool((found.A == result.factors.A).all())


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

"""Finished blocks on disk: written atomically, never recomputed, and only ever continued by a run with the same settings.

OUT/.cloq/manifest.json         what the run is: settings, versions, fingerprints of the model and of the calibration tokens
OUT/.cloq/blocks/00007.safetensors   one finished block: packed codes, scales, zero points, factors; metrics and a checksum in its header
OUT/.cloq/gradients.safetensors  how much the loss depends on each layer's outputs, where the run asks for it
OUT/.cloq/survey.safetensors     what each layer's rounding costs the loss, by width and rank, where the run has means to spend
OUT/.cloq/batch.json            sequences to a forward, where memory did not suffice for as many as were asked for
OUT/.cloq/lock                  held while a run writes here

A stored block is never used unless its checksum is that of its bytes. One that is damaged or gone is solved again, and so are all behind
it, which were calibrated on what it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cloq.algebra import packing
from cloq.errors import RunError
from cloq.streaming.checksum import BLANK, DamageError, seal, verify
from cloq.types import (
    AnyQuantizedWeight,
    CodebookWeight,
    LayerMetrics,
    LayerResult,
    LoraFactors,
    QuantizedWeight,
    WeightLayout,
    layout,
)

FOLDER = ".cloq"
BATCH_FILE = "batch.json"
GRADIENTS_FILE = "gradients.safetensors"
SURVEY_FILE = "survey.safetensors"


class RunFolder:
    """An output folder that belongs to one run: a manifest in it says which, and a lock keeps other processes out.

    out: the folder. own: what the run keeps for itself, a folder in it. option, maker, kept: what names the folder, what fills it,
    and what is kept of an interrupted run, for messages.
    """

    def __init__(self, out: str | Path, own: str, option: str, maker: str, kept: str = "finished blocks"):
        self.out = Path(out)
        self.folder = self.out / own
        self._option, self._maker, self._remedy = option, maker, resumed(option, kept)

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Turns the system's errors while writing here into `RunError` with this run's remedy."""
        return writing(self.out, self._remedy)

    def claim(self, manifest: dict[str, Any], restart: bool = False) -> None:
        """Makes the folder this run's, or finds that it is already.

        Raises `RunError` if the folder holds something that cloq did not write, a run with other settings (the differences are spelled
        out; `restart` discards that run instead), or cannot be written.
        """
        self.refuse_foreign()
        if restart and self.folder.exists():
            self.discard()
        path = self.folder / "manifest.json"
        if path.exists():
            changed = differences(self.manifest(), manifest)
            if changed:
                raise RunError(
                    f"{self.out} holds a run with other settings: {'; '.join(changed)}. "
                    f"Use the same settings to continue it, another {self._option}, or --restart to discard it"
                )
        else:
            self.keep_manifest(manifest)

    def keep_manifest(self, manifest: dict[str, Any]) -> None:
        """Says in the folder, which is made if need be, what the run is."""
        with self.writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True).encode())

    def discard(self) -> None:
        """Removes what an earlier run kept here."""
        shutil.rmtree(self.folder)

    def refuse_foreign(self) -> None:
        """Raises `RunError` if the folder is a file, holds something that cloq did not write, or cannot be one."""
        with self.writing():
            if self.out.exists() and not self.out.is_dir():
                raise RunError(f"{self.out} is a file; {self._option} names a folder")
            other = sorted(p.name for p in self.out.iterdir()) if self.out.is_dir() and not self.folder.exists() else []
        if other:
            raise RunError(f"{self.out} holds something else ({', '.join(other[:3])}); choose an empty or new folder for {self._option}")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held while a run writes here; `RunError` if another process holds it. It is free when the process ends, however it ends."""
        with self.writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = open(self.folder / "lock", "w")  # noqa: SIM115 - closed below, after the lock
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.close()
            raise RunError(f"another run is writing to {self.out}; wait for it or choose another {self._option}") from error
        try:
            yield
        finally:
            handle.close()

    def manifest(self) -> dict[str, Any]:
        """Raises `RunError` if there is no run here."""
        path = self.folder / "manifest.json"
        try:
            return json.loads(path.read_text("utf8"))
        except FileNotFoundError as error:
            where = path.relative_to(self.out)
            raise RunError(f"{self.out} holds no cloq run (no {where}); make one with {self._maker} {self._option} {self.out}") from error
        except ValueError as error:
            raise RunError(f"{path} is damaged ({error}); start over with --restart") from error


class Store(RunFolder):
    """The stored blocks of one output folder."""

    def __init__(self, out: str | Path):
        super().__init__(out, FOLDER, "--out", "cloq quantize")
        self.blocks = self.folder / "blocks"

    def begin(self, manifest: dict[str, Any], restart: bool = False) -> int:
        """Prepares the folder for a run and returns how many blocks are finished already. Errors as of `claim`. Those are not looked into;
        see `discard_damaged`."""
        self.claim(manifest, restart)
        with self.writing():
            self.blocks.mkdir(exist_ok=True)
            for leftover in self.blocks.glob(".*tmp*"):  # ours and the library's, of a run that was killed while it wrote
                leftover.unlink(missing_ok=True)
        return self.finished()

    def damage(self) -> Damage | None:
        """The first stored block that is damaged or missing; `None` where all is well. Reads every stored byte."""
        stored = self._stored()
        for index in range(stored[-1] + 1 if stored else 0):
            try:
                with self._verified(index):
                    pass
            except RunError as error:
                return Damage(index, str(error))
        return None

    def discard_damaged(self) -> str | None:
        """Removes the first damaged block and all behind it, so that they are solved again; says what was found, or `None`."""
        damage = self.damage()
        if damage is None:
            return None
        behind = [index for index in self._stored() if index >= damage.index]
        with self.writing():
            for index in reversed(behind):  # the last first: wherever this is interrupted, what is left is whole or found again
                self._path(index).unlink()
        further = behind[-1] - damage.index
        return f"{damage.message.partition('; ')[0]}: {f'it and the {further} behind it are' if further else 'it is'} solved again"

    def _stored(self) -> list[int]:
        return sorted(int(path.stem) for path in self.blocks.glob("[0-9]*.safetensors"))

    # -- how it is executed --------------------------------------------------------------------------------------------

    def kept_batch(self) -> int | None:
        """The sequences to a forward that an earlier attempt had to go down to; `None` where it had not."""
        path = self.folder / BATCH_FILE
        if not path.exists():
            return None
        try:
            return max(1, int(json.loads(path.read_text("utf8"))["sequences"]))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise RunError(f"{path} is damaged ({error}); start over with --restart") from error

    def keep_batch(self, sequences: int) -> None:
        """Every continuation goes on with so many, and ends with the same bytes as if it had not been interrupted."""
        with self.writing():
            write_atomically(self.folder / BATCH_FILE, json.dumps({"sequences": sequences}).encode())

    # -- what the loss depends on ---------------------------------------------------------------------------------------

    def keep_gradients(self, squared: dict[str, Tensor]) -> None:
        """Squared gradients by layer: every continuation goes on with the same."""
        self._keep(GRADIENTS_FILE, squared, None)

    def kept_gradients(self) -> dict[str, Tensor] | None:
        """`None` where there are none, or not as they were written: then they are found again."""
        kept = self._kept(GRADIENTS_FILE)
        return kept[0] if kept else None

    def keep_survey(self, losses: dict[str, Tensor], tied: list[list[str]]) -> None:
        """What `cloq.streaming.survey` found: every continuation chooses from the same."""
        self._keep(SURVEY_FILE, losses, tied)

    def kept_survey(self) -> tuple[dict[str, Tensor], list[list[str]]] | None:
        """`None` as of `kept_gradients`."""
        return self._kept(SURVEY_FILE)

    def _keep(self, file: str, tensors: dict[str, Tensor], about: Any) -> None:
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
        with self.writing():
            write_tensors(self.folder / file, tensors, {"about": json.dumps({"sha256": BLANK, "about": about})}, seal)

    def _kept(self, file: str) -> tuple[dict[str, Tensor], Any] | None:
        path = self.folder / file
        try:
            verify(path)
            with safe_open(path, framework="pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
                return tensors, json.loads(stored.metadata()["about"])["about"]
        except (DamageError, SafetensorError, OSError):
            return None

    # -- blocks --------------------------------------------------------------------------------------------------------

    def _path(self, index: int) -> Path:
        return self.blocks / f"{index:05d}.safetensors"

    def finished(self) -> int:
        """How many blocks are finished, counted from the first."""
        count = 0
        while self._path(count).exists():
            count += 1
        return count

    def write(self, index: int, results: dict[str, LayerResult]) -> None:
        """Stores one block; after this returns it survives a crash. Raises `RunError` when the disk is full or cannot be written."""
        tensors, layers = {}, {}
        for name, result in results.items():
            parts, layers[name] = to_tensors(result)
            tensors |= {f"{name}/{key}": value.cpu().contiguous() for key, value in parts.items()}
        with self.writing():
            write_tensors(self._path(index), tensors, {"block": json.dumps({"sha256": BLANK, "index": index, "layers": layers})}, seal)

    def read(self, index: int) -> dict[str, LayerResult]:
        """One stored block, on the CPU. Raises `RunError` if its file is damaged or missing."""
        with self._verified(index) as (file, layers):
            return {n: from_tensors(lambda key, n=n: file.get_tensor(f"{n}/{key}"), described) for n, described in layers.items()}

    def summaries(self) -> dict[str, LayerSummary]:
        """Layout and metrics of every stored layer by name, without any tensor in memory. Errors as of `read`."""
        found = {}
        for index in range(self.finished()):
            with self._verified(index) as (_, layers):
                for name, described in layers.items():
                    weight = described["weight"] | {"shape": tuple(described["weight"]["shape"])}
                    found[name] = LayerSummary(WeightLayout(**weight), _metrics(described["metrics"]))
        return found

    @contextlib.contextmanager
    def _verified(self, index: int) -> Iterator[tuple[Any, dict[str, Any]]]:
        """A stored block, open, and what its header says of its layers, once every byte of it is known to be as it was written."""
        path = self._path(index)
        try:
            verify(path)
            with safe_open(path, framework="pt") as file:
                header = json.loads(file.metadata()["block"])
                if header["index"] != index:
                    raise DamageError(f"it is block {header['index']} under another name")
                yield file, header["layers"]
        except (DamageError, SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise RunError(
                f"the stored block {path} is damaged or missing ({reason}); run the same cloq quantize command again: it is solved again, "
                "with all behind it"
            ) from error


class Damage(NamedTuple):
    """A stored block that cannot be used. message: which file, why, and what to do."""

    index: int
    message: str


class LayerSummary(NamedTuple):
    """What is known of a stored layer without its tensors."""

    layout: WeightLayout
    metrics: LayerMetrics


def to_tensors(result: LayerResult) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A result as small as it goes, bit for bit: tensors by name, and what describes them, in JSON values."""
    described = {"weight": dataclasses.asdict(layout(result.weight)), "metrics": dataclasses.asdict(result.metrics)}
    return _weight_to_tensors(result.weight) | {"A": result.factors.A, "B": result.factors.B}, described


def _weight_to_tensors(weight: AnyQuantizedWeight) -> dict[str, Tensor]:
    codes = packing.pack(weight.codes, weight.bits)
    if isinstance(weight, CodebookWeight):
        return {"codes": codes, "scale": weight.scale, "codebook": weight.codebook}
    half = weight.scale.half()  # exact for cloq's own grids; a given base may have scales that float16 cannot hold
    scale = half if torch.equal(half.float(), weight.scale) else weight.scale
    return {"codes": codes, "scale": scale, "zero": weight.zero, "group_index": weight.group_index.int()}


def from_tensors(get: Callable[[str], Tensor], described: dict[str, Any]) -> LayerResult:
    """The inverse of `to_tensors`. get: a tensor by its name."""
    about, metrics = described["weight"], _metrics(described["metrics"])
    codes = packing.unpack(get("codes"), about["bits"], about["shape"][1])
    if about["kind"] == "codebook":
        weight = CodebookWeight(codes, get("scale"), get("codebook"), about["group_size"], about["bits"], metrics.damping)
    else:
        weight = QuantizedWeight(
            codes, get("scale").float(), get("zero"), get("group_index").long(),
            about["bits"], about["group_size"], about["symmetric"], metrics.damping,
        )  # fmt: skip
    return LayerResult(weight, LoraFactors(get("A"), get("B")), metrics)


def _metrics(values: dict) -> LayerMetrics:
    return LayerMetrics(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Where two JSON values differ, one phrase each: `quant.bits was 2, is 3`."""
    if isinstance(old, dict) and isinstance(new, dict):
        inner = [differences(old.get(k), new.get(k), f"{where}.{k}" if where else k) for k in sorted(set(old) | set(new))]
        return [phrase for phrases in inner for phrase in phrases]
    return [] if old == new else [f"{where} was {_short(old)}, is {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:24] + "…"


def write_atomically(path: Path, content: bytes) -> None:
    """The whole content under that name or nothing: a temporary file beside it, flushed to disk, then renamed."""
    with _appearing(path) as temporary:
        temporary.write_bytes(content)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], finish: Callable[[Path], None] | None = None) -> None:
    """A safetensors file, as atomically, without a second copy of the tensors in memory. finish: done to the file before it appears."""
    with _appearing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # which is how the library reports a full disk
            raise OSError(str(error).removeprefix("Error while serializing: ")) from error
        if len(metadata) > 1:
            _sort_metadata(temporary)
        if finish is not None:
            finish(temporary)


def _sort_metadata(path: Path) -> None:
    """safetensors writes metadata in an order that changes from process to process; equal runs write equal bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(length))


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name once it is whole and on the disk, and vanishes if that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _flush_folder(folder: Path) -> None:
    """Puts the folder's list of names on the disk: without it a power cut may take back the last renames."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def resumed(option: str, kept: str = "finished blocks") -> str:
    """The remedy where a run that can be continued could not write. option: what names its folder."""
    return f"make room or choose another {option}, and run the same command again: {kept} are kept"


@contextlib.contextmanager
def writing(folder: Path, remedy: str = resumed("--out")) -> Iterator[None]:
    """Turns the system's errors while writing into `RunError` with a remedy."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror or error}. Nothing is half-written; {remedy}") from error

"""Checkpoints of a run, and its folder.

    TO/adapter_config.json, adapter_model.safetensors, train.yaml     the result
    TO/training.json                    the report, written last, with a copy of the manifest: TO/checkpoints may be deleted then
    TO/checkpoints/manifest.json        what the run is: settings, versions, fingerprints of base, adapter and data
    TO/checkpoints/checkpoint-120/      the adapter, the optimizer's state and the random states after step 120
    TO/checkpoints/checkpoint-120/sealed.json   written last: of which run, and the digest of every other file
    TO/checkpoints/lock                 held while a run writes here

A checkpoint without a seal is half-written; one whose files do not match its seal, or whose seal names another run, is not this run's.
Neither is ever loaded. Within a sealed one `optimizer.pt`, `scheduler.pt` and `rng_state*.pth` are pickles, which transformers reads with
`weights_only=True`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from cloq.errors import RunError
from cloq.streaming.store import RunFolder, write_atomically

SEAL = "sealed.json"
RESULTS = ("adapter_model.safetensors", "adapter_config.json", "README.md", "train.yaml", "training.json")


class TrainingFolder(RunFolder):
    """The folder that `--to` names."""

    def __init__(self, to: str | Path):
        super().__init__(to, "checkpoints", "--to", "cloq train OUT --data ROWS", kept="checkpoints")

    def refuse_foreign(self) -> None:
        if self.folder.exists() or self.finished() is None:
            super().refuse_foreign()

    def claim(self, manifest: dict[str, Any], restart: bool = False) -> None:
        """Errors as of `RunFolder.claim`, also where the checkpoints of a finished training were deleted."""
        finished = self.finished()
        if finished is not None and not (self.folder / "manifest.json").exists() and not restart:
            if "manifest" not in finished:
                raise RunError(
                    f"{self.out} holds a finished training that does not say of what; choose another --to, or --restart to discard it"
                )
            self.keep_manifest(finished["manifest"])
        super().claim(manifest, restart)

    def finished(self) -> dict[str, Any] | None:
        """What training.json says; `None` where there is none that a training wrote."""
        try:
            report = json.loads((self.out / "training.json").read_text("utf8"))
            return report if {"started_from", "steps"} <= set(report) else None
        except (OSError, ValueError, TypeError):
            return None

    def discard(self) -> None:
        super().discard()
        for name in RESULTS:
            (self.out / name).unlink(missing_ok=True)

    @property
    def run(self) -> str:
        """Fingerprint of the run that the folder belongs to."""
        return hashlib.sha256(json.dumps(self.manifest(), sort_keys=True).encode()).hexdigest()

    def seal(self, checkpoint: Path, about: dict[str, Any]) -> None:
        """Declares a checkpoint complete: everything in it is on the disk before the seal is. about: kept in it."""
        with self.writing():
            files = {path.name: _digest_on_disk(path) for path in sorted(checkpoint.iterdir()) if path.is_file()}
            files.pop(SEAL, None)
            content = {"run": self.run, "files": files, "about": about}
            write_atomically(checkpoint / SEAL, json.dumps(content, indent=1, sort_keys=True).encode())

    def latest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint of this run that is complete and unchanged, and what its seal says about it."""
        for checkpoint in sorted(self.checkpoints(), key=_step, reverse=True):
            seal = _read_seal(checkpoint)
            if seal is not None and seal["run"] == self.run and _unchanged(checkpoint, seal["files"]):
                return checkpoint, seal["about"]
        return None

    def checkpoints(self) -> list[Path]:
        """All of them, half-written ones too."""
        return [path for path in self.folder.glob("checkpoint-*") if path.is_dir() and path.name.rsplit("-", 1)[1].isdigit()]

    def prune(self, keep: int) -> None:
        """Removes all but the newest sealed checkpoints. A checkpoint loses its seal first, so that no half-removed one has any."""
        sealed = sorted((path for path in self.checkpoints() if (path / SEAL).exists()), key=_step)
        for checkpoint in sealed[:-keep]:
            self._remove(checkpoint)

    def clear(self, step: int) -> None:
        """Removes what a run that goes on from a step cannot use: half-written checkpoints, and any of a later step."""
        for checkpoint in self.checkpoints():
            if _step(checkpoint) > step or not (checkpoint / SEAL).exists():
                self._remove(checkpoint)

    def _remove(self, checkpoint: Path) -> None:
        (checkpoint / SEAL).unlink(missing_ok=True)
        shutil.rmtree(checkpoint, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _digest_on_disk(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_seal(checkpoint: Path) -> dict[str, Any] | None:
    try:
        seal = json.loads((checkpoint / SEAL).read_text("utf8"))
        return seal if {"run", "files", "about"} <= set(seal) else None
    except (OSError, ValueError, TypeError):
        return None


def _unchanged(checkpoint: Path, files: dict[str, str]) -> bool:
    try:
        return all(_digest_on_disk(checkpoint / name) == digest for name, digest in files.items())
    except OSError:
        return False

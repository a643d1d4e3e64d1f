"""What goes wrong around a run, one function each: `(bench, draw) -> Verdict`.

Where a fault is over, the same command is run once more without it, and has to end with the undisturbed bytes.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from faults.bench import BLOCKS, Bench
from faults.damage import damaged, flipped, truncated
from faults.trial import REFUSED, RIGHT, WRONG, Ended, Process, Verdict, command, judge, same

NOBODY = 65534


def kill(bench: Bench, draw: random.Random) -> Verdict:
    """kill -9, up to three times, at any moment of the run."""
    with bench.scratch() as folder:
        for _ in range(draw.randint(1, 3)):
            process = Process(bench.quantize(folder / "out"))
            process.kill_after(draw.uniform(0, bench.seconds))
            process.ended()
        return _run(bench, folder / "out")


def stored_block(bench: Bench, draw: random.Random) -> Verdict:
    """A stored block is damaged, gone, or another one; an export must refuse it, the run must mend it."""
    with bench.scratch() as folder:
        out = shutil.copytree(bench.finished, folder / "out")
        path = out / f".cloq/blocks/{draw.randrange(BLOCKS):05d}.safetensors"
        before = path.read_bytes()
        how = draw.choice(["damage", "damage", "damage", "remove", "swap"])
        if how == "remove":
            path.unlink()
        else:
            other = out / f".cloq/blocks/{draw.randrange(BLOCKS):05d}.safetensors"
            path.write_bytes(damaged(before, draw) if how == "damage" else other.read_bytes())
        broken = not path.exists() or path.read_bytes() != before
        exported = judge(Process(command("export", out, "--format", "dense")).ended(), lambda: None)
        if exported.kind != (REFUSED if broken else RIGHT):
            return Verdict(WRONG, f"{how}: the export of a {'damaged' if broken else 'sound'} store: {exported}")
        return _run(bench, out)


def input_shard(bench: Bench, draw: random.Random) -> Verdict:
    """A shard of the model changes while the run is half done: it may not go on, and does once the shard is back."""
    with bench.scratch() as folder:
        model = shutil.copytree(bench.model, folder / "model")
        out = _half_done(bench, folder, draw)
        shard = draw.choice(sorted(model.glob("*.safetensors")))
        before = shard.read_bytes()
        shard.write_bytes(draw.choice([flipped, truncated, damaged])(before, draw))
        changed = shard.read_bytes() != before
        verdict = judge(Process(bench.quantize(out, model)).ended(), same(bench.expected, out))
        if verdict.kind != (REFUSED if changed else RIGHT):
            return Verdict(WRONG, f"a changed shard: {verdict}")
        shard.write_bytes(before)
        return _again(bench, out, verdict, model)


def fresh_shard(bench: Bench, draw: random.Random) -> Verdict:
    """A shard is damaged before anything ran. Another number is as good a number: what then comes out has to be sound in itself."""
    with bench.scratch() as folder:
        model, out = shutil.copytree(bench.model, folder / "model"), folder / "out"
        shard = draw.choice(sorted(model.glob("*.safetensors")))
        shard.write_bytes(damaged(shard.read_bytes(), draw))
        ended = Process(bench.quantize(out, model)).ended()
        return judge(ended, lambda: None if Process(command("check", out)).ended().code == 0 else "cloq check finds fault with the result")


def vanishing_shard(bench: Bench, draw: random.Random) -> Verdict:
    """A shard vanishes, or is cut short, between two blocks."""
    with bench.scratch() as folder:
        model, out = shutil.copytree(bench.model, folder / "model"), folder / "out"
        shard = draw.choice(sorted(model.glob("*.safetensors")))
        before, at, how = shard.read_bytes(), draw.randrange(BLOCKS), draw.choice([os.remove, lambda path: os.truncate(path, 1000)])
        ended = Process(_after_block(at, lambda: how(shard), bench.quantize(out, model))).ended()
        shard.write_bytes(before)
        return _again(bench, out, judge(ended, same(bench.expected, out)), model)


def run_file(bench: Bench, draw: random.Random) -> Verdict:
    """run.yaml is damaged, and a finished run is repeated from it: the same settings or a refusal."""
    with bench.scratch() as folder:
        out, config = shutil.copytree(bench.finished, folder / "out"), folder / "damaged.yaml"
        config.write_bytes(damaged((out / "run.yaml").read_bytes(), draw))
        ended = Process(command("quantize", "--config", config, "--out", out, "--quiet")).ended()
        return judge(ended, same(bench.expected, out))


def manifest(bench: Bench, draw: random.Random) -> Verdict:
    """The store's manifest is damaged."""
    with bench.scratch() as folder:
        out = shutil.copytree(bench.finished, folder / "out")
        path = out / ".cloq/manifest.json"
        path.write_bytes(damaged(path.read_bytes(), draw))
        return judge(Process(bench.quantize(out)).ended(), same(bench.expected, out))


def full_disk(bench: Bench, draw: random.Random) -> Verdict:
    """No file may grow beyond a limit, which makes writes fail half-way as a full disk does."""
    with bench.scratch() as folder:
        out, limit = folder / "out", int(2 ** draw.uniform(4, 20))

        def limited() -> int:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            return bench.quantize(out)()

        return _again(bench, out, _judged(Process(limited).ended(), bench, out))


def read_only(bench: Bench, draw: random.Random) -> Verdict:
    """A folder cannot be written; the super-user, who could, becomes nobody."""
    with bench.scratch() as folder:
        out = _half_done(bench, folder, draw)
        closed = draw.choice([out, out / ".cloq", out / ".cloq/blocks"])
        for path in [out, *out.rglob("*")]:
            path.chmod(0o777 if path.is_dir() else 0o666)
        closed.chmod(0o555)

        def unprivileged() -> int:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            return bench.quantize(out)()

        verdict = _judged(Process(unprivileged).ended(), bench, out)
        closed.chmod(0o777)
        return _again(bench, out, verdict)


def two_runs(bench: Bench, draw: random.Random) -> Verdict:
    """A second process on the same folder: it waits for nobody and disturbs nothing."""
    with bench.scratch() as folder:
        out = folder / "out"
        first = Process(bench.quantize(out))
        time.sleep(draw.uniform(0, bench.seconds))
        second = Process(bench.quantize(out))
        verdicts = [judge(process.ended(), lambda: None) for process in (second, first)]
        for verdict in verdicts:
            if verdict.kind == WRONG or (verdict.kind == REFUSED and "another run is writing" not in verdict.why):
                return Verdict(WRONG, str(verdicts))
        if all(verdict.kind == REFUSED for verdict in verdicts):
            return Verdict(WRONG, "each of two runs refused for the other")
        return _again(bench, out, verdicts[0])


def clock(bench: Bench, draw: random.Random) -> Verdict:
    """The time of day leaps to and fro, and the files are from another century."""
    with bench.scratch() as folder:
        out = _half_done(bench, folder, draw)
        for path in out.rglob("*"):
            os.utime(path, (moment := draw.randrange(0, 1 << 32), moment))

        def leaping() -> int:
            time.time = lambda: draw.uniform(0, 1 << 32)
            time.time_ns = lambda: draw.randrange(1 << 60)
            return bench.quantize(out)()

        return judge(Process(leaping).ended(), same(bench.expected, out))


FAULTS: dict[str, Callable[[Bench, random.Random], Verdict]] = {
    "kill -9 and continue": kill,
    "stored block damaged": stored_block,
    "model changes half-way": input_shard,
    "model damaged before": fresh_shard,
    "shard vanishes in between": vanishing_shard,
    "run.yaml damaged": run_file,
    "manifest damaged": manifest,
    "full disk": full_disk,
    "read-only folder": read_only,
    "two runs on one folder": two_runs,
    "clock leaps": clock,
}


def _run(bench: Bench, out: Path, model: Path | None = None) -> Verdict:
    """The undisturbed command on what is there; it has to end with the expected bytes."""
    verdict = judge(Process(bench.quantize(out, model)).ended(), same(bench.expected, out))
    return verdict if verdict.kind == RIGHT else Verdict(WRONG, f"continued: {verdict.why}")


def _again(bench: Bench, out: Path, verdict: Verdict, model: Path | None = None) -> Verdict:
    """The verdict, if the run goes on as it should now that the fault is over."""
    after = _run(bench, out, model)
    return verdict if WRONG not in (verdict.kind, after.kind) else verdict if verdict.kind == WRONG else after


def _judged(ended: Ended, bench: Bench, out: Path) -> Verdict:
    return judge(ended, same(bench.expected, out))


def _half_done(bench: Bench, folder: Path, draw: random.Random) -> Path:
    """The store of a run that was killed after some of its blocks."""
    out = folder / "out"
    shutil.copytree(bench.finished / ".cloq", out / ".cloq")
    for index in range(draw.randrange(BLOCKS), BLOCKS):
        (out / f".cloq/blocks/{index:05d}.safetensors").unlink()
    return out


def _after_block(at: int, happens: Callable[[], object], run: Callable[[], int]) -> Callable[[], int]:
    """The run, in which something happens once that block is done with and its files are closed. While they are open they are mapped into
    memory: a file that is cut short just then ends the process by a signal, as a kill does."""

    def disturbed() -> int:
        from cloq.models import Decoder

        drop = Decoder.drop_block

        def and_then(decoder: Decoder, index: int) -> None:
            drop(decoder, index)
            if index == at:
                happens()

        Decoder.drop_block = and_then
        return run()

    return disturbed

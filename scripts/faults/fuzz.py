"""What a run reads, and what can be wrong in it. A case is `(bench, draw, folder)`: it makes something doubtful below the folder and
has cloq read it. It returns where that is read well, raises a `CloqError` of one line where it is refused, and nothing else.
"""

from __future__ import annotations

import gzip
import json
import random
import resource
import shutil
import struct
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.bench import VOCABULARY, Bench
from faults.damage import damaged
from faults.trial import CRASHED, REFUSED, RIGHT, WRONG, Process, Verdict

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 64, 2**31, 2**64, 10**30, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), "", " ", "a\0b",
    "\ud800", "../..", "x" * 10_000, [], [[]], {}, {"a": 1}, ["*"], [None], [1], "cpu:x", "cuda:99", "[", "*", "None", "1e3",
)  # fmt: skip
"""Values that a setting may turn out to have."""

USUAL: dict[str, tuple[Any, ...]] = {
    "bits": (2, 3, 4, 8), "group_size": (32, 64, 128, None), "rank": (1, 4, 4096), "init": ("cloq", "zero", "svd", "qera", "eora"),
    "magr": (False, True), "seed": (0, 2**63, -1), "batch_tokens": (1, 10**9), "seq_len": (8, 32, 128, 129),
    "only": (["q_proj"], "mlp.*", ["x"]), "heldout": (0, 0.5, 1), "calib_samples": (1, 4, 10**6),
    "propagate": ("adapter", "dense"), "device": ("cpu", "auto"),
}  # fmt: skip
"""Values that a setting may well have, the largest and smallest among them."""

MEMORY = 2 << 30
"""Bytes that a batch of cases may take beyond what the process has already."""


def settings(bench: Bench, draw: random.Random, folder: Path) -> None:
    """Random settings by their flat names: refused, or a spec that comes back from JSON as it was and runs as far as the tokens."""
    from cloq.api import draw_tokens, open_decoder
    from cloq.specs import FLAT, RunSpec, run_spec

    good = {"model": str(bench.model), "calib": str(bench.text), "calib_samples": 4, "seq_len": 32, "device": "cpu"}
    drawn = {name: draw.choice(values) for name, values in USUAL.items() if draw.random() < 0.3}
    drawn |= {name: draw.choice(ODD) for name in draw.sample(sorted(FLAT), draw.choice([0, 0, 1, 2]))}
    spec = run_spec(**good | drawn)
    again = RunSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec, (again, spec)
    draw_tokens(spec, open_decoder(spec))


def run_file(bench: Bench, draw: random.Random, folder: Path) -> None:
    """A run.yaml with damage, with odd values, or with YAML's own traps."""
    import yaml

    from cloq.api import read_run_file

    path = folder / "run.yaml"
    content = (bench.finished / "run.yaml").read_bytes()
    how = draw.choice(["bytes", "value", "trap"])
    if how == "bytes":
        content = damaged(damaged(content, draw), draw)
    elif how == "value":
        content = yaml.safe_dump(_with_odd_value(yaml.safe_load(content), draw), allow_unicode=True).encode("utf8", "surrogatepass")
    else:
        content = draw.choice(YAML_TRAPS).encode()
    path.write_bytes(content)
    spec = read_run_file(path)
    assert type(spec).from_dict(spec.to_dict()) == spec


_LAUGHS = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 10))
YAML_TRAPS = (
    f"l0: &l0 [ha]\n{_LAUGHS}\nsettings: {{quant: *l9}}",
    f"l0: &l0 [ha]\n{_LAUGHS}\nsettings: {{only: *l9}}",
    f"l0: &l0 [ha]\n{_LAUGHS}\nsettings: {{model: *l9}}",
    "settings: &a {quant: *a}",
    "settings: {only: &a [*a]}",
    "settings: {1: 2, a: 3, null: 4}",
    "settings: {quant: {1: 2, b: 3}}",
    "settings: {? [a] : 1}",
    "settings: !!python/object/apply:os.system [id]",
    "settings: {model: 2001-01-01, seed: !!binary AAAA}",
    "settings: " + "[" * 5000,
    "settings: " + "{a: " * 5000,
    "settings: {calib: {seed: 0x" + "f" * 40 + "}}",
    "settings: {calib: {samples: " + "9" * 5000 + "}}",
    "settings: {calib: {samples: 0x" + "f" * 5000 + "}}",
    "settings: {quant: {damping: 0x" + "f" * 5000 + "}}",
    "settings: {quant: {damping: .nan}}",
    "settings: {quant: {magr: true, magr_alpha: .inf}}",
    "settings: {calib: {heldout: .nan}}",
    "settings: {calib: {heldout: 2001-99-99}}",
    "--- a\n--- b",
    "%TAG ! tag:x,2000:\n--- !foo {}",
    "\ufeffsettings: {}",
    "settings: {<<: 3}",
    "settings: {<<: {only: [q_proj]}}",
)


def model_config(bench: Bench, draw: random.Random, folder: Path) -> None:
    """A config.json with damage, or with an odd value; the weights are sound. What is accepted has to take tokens."""
    import torch

    from cloq.models import Decoder

    model = shutil.copytree(bench.model, folder / "model")
    path = model / "config.json"
    _spoil(path, draw, damage=0.4)
    decoder = Decoder(model)
    batch = decoder.enter(torch.zeros(1, 8, dtype=torch.int64), 8)[0]
    decoder.load_block(0)
    assert decoder.run_block(0, batch).shape == batch.hidden.shape


def _spoil(path: Path, draw: random.Random, damage: float) -> None:
    """A file of JSON with damaged bytes, by the share `damage` of the draws, or else with one odd value."""
    if draw.random() < damage:
        path.write_bytes(damaged(path.read_bytes(), draw))
    else:
        path.write_text(json.dumps(_with_odd_value(json.loads(path.read_text()), draw)), "utf8")


def shard_header(bench: Bench, draw: random.Random, folder: Path) -> None:
    """A shard whose header lies: about its own length, about offsets, shapes and types, or about the names of tensors."""
    from cloq.models import Decoder

    model = shutil.copytree(bench.model, folder / "model")
    path = draw.choice(sorted(model.glob("*.safetensors")))
    path.write_bytes(_with_lying_header(path.read_bytes(), draw))
    decoder = Decoder(model)
    for name in decoder.source_names:
        decoder.read(name)
    decoder.checkpoint.fingerprint()


def _with_lying_header(content: bytes, draw: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    how = draw.choice(["length", "offsets", "entry", "names", "bytes", "index"])
    if how == "length":
        return struct.pack("<Q", draw.choice([0, 1, length - 1, length + 1, 10**8, 2**40, 2**63, 2**64 - 1])) + content[8:]
    name = draw.choice([key for key in header if key != "__metadata__"])
    if how == "offsets":
        start, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = draw.choice(
            [[0, end - start], [end, start], [start, 2**63], [start + 4, end + 4], [-4, end], [start]]
        )
    elif how == "entry":
        header[name][draw.choice(["shape", "dtype", "data_offsets"])] = draw.choice([*ODD, "F16", "I64", "F4", [2**32, 2**32], [0]])
    elif how == "names":
        header[draw.choice(["", "../x", "a\0b", "model.layers.0", name + ".x"])] = header.pop(name)
    text = json.dumps(header).encode("utf8", "surrogatepass")
    text = damaged(text, draw) if how == "bytes" else text
    return struct.pack("<Q", len(text)) + text + data


def shard_index(bench: Bench, draw: random.Random, folder: Path) -> None:
    """An index with damage, or one that names shards where there are none, or outside of the folder."""
    from cloq.models import Decoder

    model = shutil.copytree(bench.model, folder / "model")
    path = model / "model.safetensors.index.json"
    _spoil(path, draw, damage=0.5)
    decoder = Decoder(model)
    assert all(file.parent == model for file in decoder.checkpoint._files.values())


def calibration(bench: Bench, draw: random.Random, folder: Path) -> None:
    """A file of text that is garbage, broken, empty, endless or no text at all."""
    from cloq.calibration import calibration_tokens
    from cloq.models import load_tokenizer
    from cloq.specs import CalibSpec

    suffix = draw.choice([".txt", ".json", ".jsonl", ".parquet", ".md", ".jsonl.gz", ".txt.gz", "", ".csv"])
    path = folder / f"text{suffix}"
    content = draw.choice([_garbage, _odd_rows, _long_line, _nested])(draw)
    content = damaged(content, draw) if draw.random() < 0.3 else content
    if suffix.endswith(".gz") and draw.random() < 0.8:
        content = gzip.compress(content, 1)
        content = damaged(content, draw) if draw.random() < 0.5 else content
    path.write_bytes(content)
    spec = CalibSpec(str(path), samples=2, seq_len=16, column=draw.choice([None, None, "text", "x", ""]))
    tokens = calibration_tokens(spec, load_tokenizer(bench.model), max_positions=128)
    assert tokens.calibration.shape == (2, 16) and set(tokens.calibration.unique().tolist()) <= set(range(VOCABULARY))


def _garbage(draw: random.Random) -> bytes:
    return draw.choice([b"", b"\n" * 9, b"\xef\xbb\xbftext", b"\xff\xfea\0b\0", b"PAR1", b"\x1f\x8b", bytes(400), draw.randbytes(3000)])


def _odd_rows(draw: random.Random) -> bytes:
    columns = ("text", "content", "messages", "conversations", "prompt", "response", "instruction", "output", "input", "x")
    chat = [{"role": "user", "content": "a"}, {"from": "gpt", "value": None}, {"role": ODD[-1]}, {"role": ["x"], "content": 3}]

    def value() -> Any:
        return draw.choice([*ODD, "some words of text " * 9, "some words of text " * 9, draw.sample(chat, draw.randint(0, 3))])

    rows = [draw.choice([{draw.choice(columns): value() for _ in range(draw.randint(0, 4))}] * 9 + [value()]) for _ in range(20)]
    if draw.random() < 0.4:
        return json.dumps(rows).encode()
    return "\n".join(json.dumps(row) for row in rows).encode()


def _long_line(draw: random.Random) -> bytes:
    return draw.choice(
        [b'{"text": "' + b"long " * 400_000 + b'"}', b"[" + b'{"text": "a"},' * 100_000, b"long" * 400_000, b'["' + b"x" * 10**6]
    )


def _nested(draw: random.Random) -> bytes:
    return draw.choice([b"[" * 100_000, b'{"a":' * 100_000, b'{"text": ' + b"9" * 10_000 + b"}", b'[{"text": ' + b"9" * 10_000 + b"}]"])


def tokenizer(bench: Bench, draw: random.Random, folder: Path) -> None:
    """Tokenizer files with damage or odd values, paths among them."""
    from cloq.calibration import calibration_tokens
    from cloq.models import load_tokenizer
    from cloq.specs import CalibSpec

    model = shutil.copytree(bench.model, folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    path = model / draw.choice(["tokenizer.json", "tokenizer_config.json"])
    if draw.random() < 0.5:
        path.write_bytes(damaged(path.read_bytes(), draw))
    else:
        path.write_text(json.dumps(_with_odd_value(json.loads(path.read_text("utf8")), draw)), "utf8")
    calibration_tokens(CalibSpec(str(bench.text), samples=2, seq_len=16), load_tokenizer(model), max_positions=128)


def exported(bench: Bench, draw: random.Random, folder: Path) -> None:
    """A file of a finished run's base or adapter is damaged: `cloq check` says so or finds it sound, and never falls over."""
    from cloq.use.check import check

    out = shutil.copytree(bench.finished, folder / "out")
    path = draw.choice(
        sorted(p for part in ("model", "adapter", ".cloq") for p in (out / part).rglob("*") if p.is_file() and p.stat().st_size)
    )
    if path.suffix == ".json" and draw.random() < 0.6:
        path.write_text(json.dumps(_with_odd_value(json.loads(path.read_text("utf8")), draw)), "utf8")
    else:
        path.write_bytes(damaged(path.read_bytes(), draw))
    assert check(out)


def _with_odd_value(values: Any, draw: random.Random) -> Any:
    """A copy in which one value, at any depth, is another one, or gone."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            places.append((value, key))
            if isinstance(inner, (dict, list)):
                walk(inner)

    values = json.loads(json.dumps(values))
    walk(values)
    holder, key = draw.choice(places)
    if isinstance(holder, dict) and draw.random() < 0.15:
        del holder[key]
    else:
        holder[key] = draw.choice(ODD)
    return values


CASES: dict[str, Callable[[Bench, random.Random, Path], None]] = {
    "settings": settings,
    "run.yaml": run_file,
    "config.json": model_config,
    "safetensors header": shard_header,
    "safetensors index": shard_index,
    "calibration file": calibration,
    "tokenizer": tokenizer,
    "exported files": exported,
}


def verdict_on(case: Callable, bench: Bench, draw: random.Random) -> Verdict:
    """Of one case, in this process."""
    from cloq.cli import told
    from cloq.errors import CloqError

    with tempfile.TemporaryDirectory(dir=bench.work) as folder:
        try:
            case(bench, draw, Path(folder))
        except CloqError as error:
            text = told(error)
            return Verdict(REFUSED, text) if text.count("\n") <= 1 else Verdict(WRONG, f"a message of many lines: {text}")
        except BaseException:
            return Verdict(WRONG, traceback.format_exc(chain=False)[-2000:])
    return Verdict(RIGHT)


def batch(name: str, bench: Bench, seed: str, examples: int) -> list[Verdict]:
    """Of many cases, in a process whose memory is bounded."""
    with bench.scratch() as folder:
        log = folder / "verdicts"

        def run() -> None:
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
            with log.open("w") as lines:
                for number in range(examples):
                    verdict = verdict_on(CASES[name], bench, random.Random(f"{seed}/{number}"))
                    lines.write(json.dumps([verdict.kind, verdict.why]) + "\n")
                    lines.flush()

        ended = Process(run).ended()
        verdicts = [Verdict(*json.loads(line)) for line in log.read_text().splitlines()]
        if len(verdicts) < examples:
            code = "hung" if ended.code == -9 else f"exit code {ended.code}" if ended.code != CRASHED else "crashed"
            verdicts.append(Verdict(WRONG, f"case {len(verdicts)} of {seed}: {code}: {ended.said[-1000:]}"))
        return verdicts

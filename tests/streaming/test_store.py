"""The store: what goes in comes out, nothing is half-written or used where it is damaged, and only a run with the same settings
continues it."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from cloq.errors import RunError
from cloq.quantizers import Gptq, Rtn
from cloq.streaming.store import Store, differences, write_atomically
from cloq.types import CodebookWeight, LayerMetrics, LayerResult, LayerStats, LoraFactors, layout

METRICS = LayerMetrics(0.5, 0.25, 0.6, None, 128, 0.01, 1.5, 4, 2.3, (0.5, 0.25), ("a note",))
MANIFEST = {"settings": {"quant": {"bits": 2}, "only": []}, "model": "abc"}


def layer(weight, rank=4) -> LayerResult:
    out, columns = weight.shape
    return LayerResult(weight, LoraFactors(torch.randn(rank, columns), torch.randn(out, rank)), METRICS)


def weights():
    torch.manual_seed(0)
    dense, x = torch.randn(48, 80), torch.randn(200, 80)
    stats = LayerStats(x.T @ x, 200)
    yield from (Rtn(bits, group).quantize(dense) for bits in (2, 3, 4, 8) for group in (32, 64, None))
    yield Gptq(2, 32, act_order=True).quantize(dense, stats)
    yield Gptq(3, None, symmetric=True).quantize(dense, stats)
    own = Rtn(4, 32).quantize(dense)
    yield dataclasses.replace(own, scale=own.scale * 1.0001)  # someone else's float32 scales, which float16 cannot hold
    yield CodebookWeight(torch.randint(0, 16, (48, 80), dtype=torch.uint8), torch.rand(60), torch.linspace(-1, 1, 16), 64)


def test_a_block_comes_back_as_it_was(tmp_path):
    store = Store(tmp_path / "out")
    store.begin(MANIFEST)
    before = {f"model.layers.0.part{i}": layer(w) for i, w in enumerate(weights())}
    store.write(0, before)
    after = store.read(0)
    assert list(after) == list(before)
    for name, result in before.items():
        assert torch.equal(after[name].weight.dequantize(), result.weight.dequantize())
        assert torch.equal(after[name].weight.codes, result.weight.codes)
        assert torch.equal(after[name].factors.A, result.factors.A) and torch.equal(after[name].factors.B, result.factors.B)
        assert after[name].metrics == result.metrics
        assert store.summaries()[name].layout == layout(result.weight) == layout(after[name].weight)


def test_equal_blocks_are_equal_bytes(tmp_path):
    results = {f"part{i}": layer(w) for i, w in enumerate(weights())}
    for folder in ("a", "b"):
        store = Store(tmp_path / folder)
        store.begin(MANIFEST)
        store.write(0, results)
    files = [(tmp_path / f / ".cloq/blocks/00000.safetensors").read_bytes() for f in ("a", "b")]
    assert files[0] == files[1]


def test_finished_counts_from_the_first_without_gaps(tmp_path):
    store = Store(tmp_path)
    store.begin(MANIFEST)
    one = {"part": layer(Rtn(2, 32).quantize(torch.randn(32, 64)))}
    for index in (0, 1, 3):
        store.write(index, one)
    assert store.finished() == 2


def test_other_settings_are_refused_by_name_and_restart_discards(tmp_path):
    store = Store(tmp_path)
    store.begin(MANIFEST)
    store.write(0, {"part": layer(Rtn(2, 32).quantize(torch.randn(32, 64)))})
    changed = {"settings": {"quant": {"bits": 3}, "only": []}, "model": "abc"}
    with pytest.raises(RunError, match=r"settings.quant.bits was 2, is 3.*--restart"):
        store.begin(changed)
    assert store.begin(MANIFEST) == 1
    assert store.begin(changed, restart=True) == 0


def test_a_foreign_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not lose me")
    with pytest.raises(RunError, match=r"holds something else \(thesis.txt\)"):
        Store(tmp_path).begin(MANIFEST)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(RunError, match="is a file"):
        Store(tmp_path / "thesis.txt").begin(MANIFEST)
    with pytest.raises(RunError, match=r"cannot write to .*name too long"):
        Store(tmp_path / (300 * "x")).refuse_foreign()


def stored(root, blocks=4) -> Store:
    store = Store(root)
    store.begin(MANIFEST)
    for index in range(blocks):
        store.write(index, {f"{index}.part": layer(Rtn(2, 32).quantize(torch.randn(32, 64)))})
    return store


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def flip_a_code(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def change_a_metric(path):
    path.write_bytes(path.read_bytes().replace(b"0.25", b"0.35", 1))


def take_the_neighbours_place(path):
    path.write_bytes(path.with_name("00000.safetensors").read_bytes())


def lose_the_checksum(path):
    path.write_bytes(path.read_bytes().replace(b"sha256", b"sha255", 1))


def claim_a_huge_header(path):
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


DAMAGES = {
    truncate: "cut short|does not match",
    empty: "no checksum",
    flip_a_code: "checksum does not match",
    change_a_metric: "checksum does not match",
    take_the_neighbours_place: "it is block 0 under another name",
    lose_the_checksum: "no checksum",
    claim_a_huge_header: "header is damaged",
    os.remove: "No such file",
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.items())
def test_a_damaged_block_is_never_read_and_says_which_file(damage, reason, tmp_path):
    store = stored(tmp_path)
    damage(tmp_path / ".cloq/blocks/00001.safetensors")
    message = rf"00001\.safetensors is damaged or missing \(.*({reason}).*run the same cloq quantize command"
    with pytest.raises(RunError, match=message) as caught:
        store.read(1)
    assert "\n" not in str(caught.value)
    if damage is not os.remove:
        with pytest.raises(RunError, match=r"00001\.safetensors"):
            store.summaries()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_block_is_discarded_with_all_behind_it(damage, tmp_path):
    store = stored(tmp_path)
    damage(tmp_path / ".cloq/blocks/00001.safetensors")
    said = store.discard_damaged()
    assert "00001.safetensors is damaged or missing" in said and said.endswith("it and the 2 behind it are solved again")
    assert [p.name for p in store.blocks.iterdir()] == ["00000.safetensors"] and store.finished() == 1
    assert store.discard_damaged() is None


def test_every_single_bit_of_a_stored_block_is_watched(tmp_path):
    """Flips each bit of the header's length, and one bit of every byte behind it."""
    store = stored(tmp_path, blocks=1)
    path = tmp_path / ".cloq/blocks/00000.safetensors"
    content = path.read_bytes()
    flips = [(at, bit) for at in range(8) for bit in range(8)] + [(at, at % 8) for at in range(8, len(content), 7)]
    for at, bit in flips:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        with pytest.raises(RunError, match="damaged"):
            store.read(0)
    path.write_bytes(content)
    assert store.read(0)


def test_no_run_says_so(tmp_path):
    with pytest.raises(RunError, match="holds no cloq run"):
        Store(tmp_path).manifest()


def test_a_second_run_on_the_same_folder_is_refused(tmp_path):
    code = f"from cloq.streaming.store import Store\nwith Store({str(tmp_path / 'out')!r}).lock(): pass"
    with Store(tmp_path / "out").lock():
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert second.returncode != 0 and "another run is writing" in second.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("write", ["write_atomically(path, b'x' * 100_000)", "write_tensors(path, {'x': torch.ones(100_000)}, {})"])
def test_a_full_disk_leaves_the_old_content_and_no_leftover(tmp_path, write):
    """A file size limit makes the write itself fail half-way, as a full disk does."""
    code = f"""
import resource
import torch
from pathlib import Path
from cloq.errors import RunError
from cloq.streaming.store import write_atomically, write_tensors, writing
path = Path({str(tmp_path)!r}) / "block"
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with writing(path.parent):
        {write}
except RunError as error:
    print(error)
"""
    write_atomically(tmp_path / "block", b"old")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "cannot write" in said and "finished blocks are kept" in said
    assert (tmp_path / "block").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["block"]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "block", b"content")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    store = Store(tmp_path)
    store.begin(MANIFEST)
    for name in (".00000.safetensors.123.tmp", ".tmpJvT7wN"):
        (tmp_path / ".cloq/blocks" / name).write_bytes(b"half")
    assert store.begin(MANIFEST) == 0
    assert list((tmp_path / ".cloq/blocks").iterdir()) == []


def test_differences_are_spelled_out_at_every_depth():
    old = {"a": {"b": 1, "c": [1, 2]}, "same": 0, "gone": "x"}
    new = {"a": {"b": 2, "c": [1, 3]}, "same": 0, "new": True}
    assert differences(old, new) == ["a.b was 1, is 2", "a.c was [1, 2], is [1, 3]", 'gone was "x", is null', "new was null, is true"]
    assert differences(old, old) == []

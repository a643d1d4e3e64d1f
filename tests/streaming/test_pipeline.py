"""The loop: what is kept to save time changes no byte of a result."""

import pytest
import torch

from cloq.calibration import CalibrationTokens
from cloq.models import Decoder
from cloq.specs import run_spec
from cloq.streaming import pipeline
from cloq.streaming.store import Store
from tests.tiny import save_tiny

SMALL = {"bits": 2, "group_size": 32, "rank": 4, "rounds": 1, "seq_len": 16, "device": "cpu", "batch_tokens": 32}
SETTINGS = [
    {},
    {"correction": 0.0},
    {"correction": 0.5},
    {"sequential": False},
    {"propagate": "dense"},
    {"propagate": "quantized"},
    {"skip": "*.o_proj"},
]


def blocks(folder, out, spare, monkeypatch, events=None, **settings) -> list[bytes]:
    monkeypatch.setattr(pipeline, "spare_memory", lambda *device: spare)
    spec = run_spec(model=str(folder), **(SMALL | settings))
    tokens = torch.randint(0, 250, (9, 16), generator=torch.Generator().manual_seed(0))
    store = Store(out)
    with store.lock():
        pipeline.quantize_blocks(
            spec,
            Decoder(folder),
            CalibrationTokens(tokens[:6], tokens[6:]),
            store,
            lambda *event: None if events is None else events.append(event),
        )
    return [{name: (result.weight, result.factors) for name, result in store.read(index).items()} for index in range(store.finished())]


def same(one, other) -> bool:
    return len(one) == len(other) > 0 and all(
        a.keys() == b.keys()
        and all(
            torch.equal(a[name][0].dequantize(), b[name][0].dequantize())
            and torch.equal(a[name][1].A, b[name][1].A)
            and torch.equal(a[name][1].B, b[name][1].B)
            for name in a
        )
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *(("llama", settings) for settings in SETTINGS),
        *(
            (family, {})
            for family in (
                "gpt2",
                "phi3",
                "gpt_neox",
                "falcon",
                "opt",
                "bloom",
                "gemma2",
                "gemma4-shared",
                "mixtral",
                "deepseek_v3",
                "mamba",
            )
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()) or "defaults",
)
def test_room_changes_the_time_and_not_the_result(family, settings, tmp_path, monkeypatch):
    """None at all, too little for everything, and enough."""
    folder = save_tiny(family, tmp_path / "model")
    none, some, all_of_it = (
        blocks(folder, tmp_path / str(spare), spare, monkeypatch, **settings) for spare in (0, 3 * 16 * 64 * 4 + 100, 1 << 40)
    )
    assert same(none, some) and same(none, all_of_it)


def test_a_continued_run_is_the_same_whatever_room_there_was(tmp_path, monkeypatch):
    folder = save_tiny("llama", tmp_path / "model")
    whole = blocks(folder, tmp_path / "out", 1 << 40, monkeypatch)
    (tmp_path / "out/.cloq/blocks/00001.safetensors").unlink()
    (tmp_path / "out/.cloq/blocks/00002.safetensors").unlink()
    assert same(whole, blocks(folder, tmp_path / "out", 0, monkeypatch))

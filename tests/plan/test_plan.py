import json

import pytest
import torch
from safetensors import safe_open

from cloq.calibration import CalibrationTokens
from cloq.errors import SpecError
from cloq.export import FORMATS, write_adapter, write_model
from cloq.models import Decoder, linear_shape
from cloq.plan import plan, rough, time_range
from cloq.plan.storage import quantized_bits
from cloq.plan.work import Machine, Work
from cloq.quantizers import from_spec
from cloq.specs import QuantSpec, run_spec
from cloq.streaming import pipeline
from cloq.streaming.store import Store
from cloq.types import LayerStats
from tests.tiny import save_tiny

MACHINE = Machine(products=1e10, wide=5e9, streamed=1e10, cached=5e10, searched=5e7, calls=1e6)
SMALL = {"group_size": 32, "rank": 8, "calib": "demo", "calib_samples": 6, "heldout": 0.5, "seq_len": 16, "device": "cpu"}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return Decoder(save_tiny("llama-tied", tmp_path_factory.mktemp("llama")))


def _plan(decoder, spare=0, **settings):
    return plan(run_spec(model=str(decoder.folder), **(SMALL | settings)), decoder, MACHINE, spare)


def test_what_is_planned_is_what_a_run_does(decoder, tmp_path):
    """Layers, tokens, phases, bits per weight and bytes on disk of a plan against the run itself."""
    spec = run_spec(model=str(decoder.folder), **SMALL)
    planned = plan(spec, decoder, MACHINE)
    tokens = torch.randint(0, 250, (9, 16), generator=torch.Generator().manual_seed(0))
    events = []
    store = Store(tmp_path / "out")
    with store.lock():
        pipeline.quantize_blocks(spec, decoder, CalibrationTokens(tokens[:6], tokens[6:]), store, lambda *event: events.append(event))
    write_model(decoder, store, FORMATS["gptq"](), tmp_path / "out" / "model")
    write_adapter(store, "base", decoder.all_linears(), tmp_path / "out" / "adapter")

    started = next(values for name, values in events if name == "start")
    assert (planned.layers, planned.blocks) == (started["layers"], started["blocks"])
    assert (planned.tokens, planned.heldout) == (6 * 16, 3 * 16)
    assert {values["phase"] for name, values in events if name == "phase"} <= set(planned.work)
    summaries = store.summaries().values()
    weights = sum(s.layout.shape[0] * s.layout.shape[1] for s in summaries)
    assert planned.quantized == weights
    assert planned.bits["none"] == pytest.approx(
        sum(s.metrics.bits_per_weight * s.layout.shape[0] * s.layout.shape[1] for s in summaries) / weights
    )
    assert planned.bits["32-bit"] == pytest.approx(planned.bits["none"] + 8 * planned.disk["adapter"] / weights)
    assert planned.disk["adapter"] == _tensor_bytes(tmp_path / "out" / "adapter")
    assert planned.disk["base"] == pytest.approx(_tensor_bytes(tmp_path / "out" / "model"), rel=0.03)
    assert planned.disk["finished blocks"] == pytest.approx(_tensor_bytes(tmp_path / "out" / ".cloq" / "blocks"), rel=0.03)


def _tensor_bytes(folder) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 - not a mapping
    return total


@pytest.mark.parametrize("shape", [(96, 64), (40, 100), (64, 33)])
@pytest.mark.parametrize(
    "quant",
    [QuantSpec(bits=b, group_size=g, quantizer="rtn") for b in (2, 3, 4, 8) for g in (32, 64, None)] + [QuantSpec(bits=4, quantizer="nf4")],
    ids=lambda q: f"{q.quantizer}-{q.bits}-{q.group_size}",
)
def test_stored_bits_are_those_of_the_quantized_weight(shape, quant):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    quantized = from_spec(quant).quantize(weight, LayerStats(torch.eye(shape[1]), 1))
    assert quantized_bits(shape, quant) == quantized.storage_bits()


def test_no_weight_is_read(decoder, monkeypatch):
    monkeypatch.setattr(type(decoder.checkpoint), "read", lambda *_: pytest.fail("a weight was read"))
    assert _plan(decoder).seconds["capture"] > 0


def test_twice_the_text_is_twice_the_forwards_and_leaves_the_solve_alone(decoder):
    once, twice = _plan(decoder), _plan(decoder, calib_samples=12)
    for phase, factor in {"propagate": 2, "solve": 1, "apply": 1, "store": 1}.items():
        assert twice.seconds[phase] == pytest.approx(factor * once.seconds[phase])
    assert twice.seconds["capture"] == pytest.approx(
        2 * once.seconds["capture"], rel=0.02
    )  # which has a product with the Gram matrix in it
    assert twice.memory["activations"] == 2 * once.memory["activations"] if "activations" in once.memory else True


def test_one_forward_for_a_block_is_less_than_one_for_each_group(decoder):
    sequential, together = _plan(decoder), _plan(decoder, sequential=False)
    assert together.work["capture"].products < sequential.work["capture"].products
    assert together.work["solve"] == sequential.work["solve"]
    together, dense = _plan(decoder, sequential=False, correction=0.0), _plan(decoder, propagate="dense")
    assert dense.work["capture"] == together.work["capture"] and dense.seconds["apply"] == 0 < sequential.seconds["apply"]


def test_what_the_correction_costs_is_counted(decoder):
    without, with_it = _plan(decoder, correction=0.0), _plan(decoder, correction=0.5)
    for phase in ("embed", "capture", "solve", "propagate"):
        assert sum(vars(with_it.work[phase]).values()) > sum(vars(without.work[phase]).values())
    assert sum(with_it.memory.values()) > sum(without.memory.values()) and with_it.work["export"] == without.work["export"]


def test_what_there_is_room_for_is_not_computed_again(decoder):
    needed = _plan(decoder, spare=1 << 40).memory["kept in a block"]
    plans = [_plan(decoder, spare=share * needed) for share in (0, 0.5, 1, 2)]
    assert [made.memory["kept in a block"] for made in plans] == [0, needed // 2, needed, needed]
    capture, propagate = ([made.work[phase].products for made in plans] for phase in ("capture", "propagate"))
    assert capture[0] > capture[1] > capture[2] == capture[3] and propagate[0] > propagate[1] > propagate[2]
    assert capture[1] == pytest.approx((capture[0] + capture[2]) / 2) and plans[0].work["solve"] == plans[2].work["solve"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"correction": 0.0},
        {"correction": 0.5},
        {"sequential": False},
        {"propagate": "dense"},
        {"skip": "o_proj"},
        {"correction": 0.0, "sequential": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("spare", [0, 1 << 40])
def test_the_forwards_of_a_run_are_those_of_its_plan(settings, spare, tmp_path, monkeypatch):
    """Products of weights and activations, counted in every layer that a run calls (and does not mute), against the plan's."""
    done = []

    def uncounted(look):
        def looked(*args):
            before = len(done)
            found = look(*args)
            del done[before:]
            return found

        return looked

    decoder = Decoder(save_tiny("llama-tied", tmp_path / "model"))
    decoder.check_streamable()
    for index in range(len(decoder.blocks)):
        for module in decoder.linears(index).values():
            module.register_forward_hook(lambda m, x, y: "forward" in vars(m) or done.append(2.0 * y.numel() * m.in_features))  # not muted
    monkeypatch.setattr(pipeline, "spare_memory", lambda *device: spare)
    monkeypatch.setattr(pipeline.Kinds, "of", uncounted(pipeline.Kinds.of))
    monkeypatch.setattr(pipeline, "groups_of", uncounted(pipeline.groups_of))
    # the look at a block leaves something of its one sequence to the forwards that are counted
    settings = settings | {"calib_samples": 12, "fisher": 0.0}
    spec = run_spec(model=str(decoder.folder), **(SMALL | settings))
    tokens = torch.randint(0, 250, (18, 16), generator=torch.Generator().manual_seed(0))
    store = Store(tmp_path / "out")
    with store.lock():
        pipeline.quantize_blocks(spec, decoder, CalibrationTokens(tokens[:12], tokens[12:]), store, lambda *event: None)
    run = sum(done)
    monkeypatch.setattr("cloq.plan.forward._ATTENTION", 0.0)
    for sums in ("gram", "drift"):
        monkeypatch.setattr(f"cloq.plan.algebra.{sums}", lambda *shape: Work())
    planned = _plan(decoder, spare, **settings).work
    assert run == pytest.approx(planned["capture"].products + planned["propagate"].products, rel=0.01)


def test_layers_that_are_left_out_cost_nothing(decoder):
    whole, part = _plan(decoder), _plan(decoder, only="q_proj")
    assert (part.layers, part.dense) == (3, whole.layers - 3)
    assert part.seconds["solve"] < whole.seconds["solve"] / 4 and part.disk["base"] > whole.disk["base"]
    assert any("left as they are" in line for line in part.lines())


def test_a_given_base_is_not_quantized_again(decoder):
    given = _plan(decoder, quantized="somewhere")
    assert "base" not in given.disk and given.seconds["solve"] < _plan(decoder).seconds["solve"]


def test_clipped_ranks_and_sampled_text_are_said(decoder):
    notes = "\n".join(_plan(decoder, rank=64, calib="self").lines())
    assert "the rank will be clipped in 6 layers; model.layers.0.self_attn.k_proj allows 32" in notes and "comes on top" in notes


def test_memory_that_is_not_there_is_said_with_what_helps(decoder, monkeypatch):
    needed = sum(value for name, value in _plan(decoder, activations="host").memory.items() if name != "process")
    monkeypatch.setattr("cloq.plan.free_memory", lambda device: needed)
    assert not _plan(decoder, activations="host").notes
    monkeypatch.setattr("cloq.plan.free_memory", lambda device: needed - 1)
    [note] = _plan(decoder, activations="host").notes
    assert f"{rough(needed)} on cpu, where {rough(needed - 1)} are free" in note and "with --activations disk, fewer" in note
    monkeypatch.setattr("cloq.plan.free_memory", lambda device: 0)
    [note] = _plan(decoder, activations="disk").notes
    assert "where 0 B are free" in note and "needed with fewer --calib-samples" in note
    monkeypatch.setattr("cloq.plan.free_memory", lambda device: None)
    assert not _plan(decoder, activations="host").notes


def test_patterns_that_match_nothing_are_refused(decoder):
    with pytest.raises(SpecError, match="matches no linear layer"):
        _plan(decoder, only="nothing_like_this")


def test_json_and_lines_say_the_same(decoder):
    planned = _plan(decoder)
    values = json.loads(json.dumps(planned.to_dict(), allow_nan=False))
    assert values["seconds_total"] == pytest.approx(sum(values["seconds"].values()))
    assert values["seconds_range"][0] < values["seconds_total"] < values["seconds_range"][1]
    text = "\n".join(planned.lines())
    assert time_range(values["seconds_total"]) in text and f"{values['bits']['none']:.2f} bits per weight" in text


@pytest.mark.parametrize(
    "seconds, said",
    [
        (0.4, "a second or two"),
        (10, "7 to 20 seconds"),
        (100, "1 to 3 minutes"),
        (1000, "10 to 30 minutes"),
        (20_000, "3 to 9 hours"),
        (1e6, "8 to 20 days"),
    ],
)
def test_times_are_a_range_of_single_digits(seconds, said):
    assert time_range(seconds) == said


@pytest.mark.parametrize(
    "value, said", [(0, "0 B"), (617e6, "600 MB"), (1.44e9, "1.4 GB"), (3.3e9, "3.5 GB"), (28.6e9, "30 GB"), (19_000, "19 kB")]
)
def test_memory_is_rough(value, said):
    assert rough(value) == said


def test_following_the_loss_back_is_planned(decoder):
    plain, weighed = _plan(decoder, fisher=0.0), _plan(decoder)
    assert plain.work["gradients"].products == 0 and weighed.work["gradients"].products > 0
    others = {name: work for name, work in weighed.work.items() if name != "gradients"}
    assert others == {name: work for name, work in plain.work.items() if name != "gradients"}
    whole = 3 * sum(2.0 * out * columns for out, columns in _shapes(decoder)) + 4.0 * 288 * 64
    tokens = weighed.tokens
    assert 1 < weighed.work["gradients"].products / (tokens * whole) < 1.2  # attention comes on top


def test_a_mean_that_is_still_to_be_spent_is_planned(decoder):
    plain, spending, ranks = (_plan(decoder, fisher=0.0, **asked) for asked in ({}, {"bits": 2.5}, {"adaptive_rank": True}))
    assert spending.bits["none"] == pytest.approx(plain.bits["none"] + 0.5 * (1 + 1 / 32), abs=0.03)
    assert spending.work["gradients"] == ranks.work["gradients"] != plain.work["gradients"] == plain.work["survey"]
    assert 0 < ranks.work["survey"].products < spending.work["survey"].products  # one width instead of three
    assert ranks.bits == plain.bits and ranks.work["solve"] == spending.work["solve"] == plain.work["solve"]


def _shapes(decoder):
    return [linear_shape(module) for index in range(len(decoder.blocks)) for module in decoder.linears(index).values()]


def test_what_waits_on_disk_is_counted_there(decoder):
    settings = {"effort": "best", "seq_len": 64, "calib_samples": 64}
    memory, disk = _plan(decoder, **settings), _plan(decoder, **settings, activations="disk")
    moved = {name: size for name, size in disk.disk.items() if name.endswith("while it runs")}
    assert moved["activations while it runs"] == 2 * (64 + 32) * 64 * decoder.bytes_of_a_token
    assert moved["what blocks were given while it runs"] == 3 * 64 * 64 * decoder.width * 2  # bfloat16
    assert memory.disk == {name: size for name, size in disk.disk.items() if name not in moved}
    assert "activations" not in disk.memory and "what blocks were given" not in disk.memory
    assert sum(disk.memory.values()) < sum(memory.memory.values())
    assert disk.work["propagate"].disk == 2 * moved["activations while it runs"] and memory.work["propagate"].disk == 0
    assert disk.work["capture"].disk == 0, "what memory holds beside everything else is not read again"


def test_what_memory_does_not_hold_is_read_again_for_every_forward(decoder, monkeypatch):
    monkeypatch.setattr("cloq.plan.free_memory", lambda device: 1 << 10)
    planned = _plan(decoder, activations="disk")
    rounds = 4  # of a block: q, k and v; o; gate and up; down
    size = planned.disk["activations while it runs"]
    assert planned.work["capture"].disk == 3 * rounds * size and planned.work["propagate"].disk == 2 * 2 * size

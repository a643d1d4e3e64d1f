import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloq.report.record import Report, cumulative_shares, place, share_repaired, stored_spectrum
from cloq.specs import run_spec
from cloq.use.evaluate import Quality
from tests.report import synthetic


@pytest.mark.parametrize(
    "name, block, kind",
    [
        ("model.layers.3.self_attn.q_proj", 3, "self_attn.q_proj"),
        ("transformer.h.11.attn.c_attn", 11, "attn.c_attn"),
        ("gpt_neox.layers.0.attention.dense", 0, "attention.dense"),
        ("model.layers.7.mlp.experts.12.up_proj", 7, "mlp.experts.*.up_proj"),
        ("lm_head", None, "lm_head"),
    ],
)
def test_place(name, block, kind):
    assert place(name) == (block, kind)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4), st.booleans(), st.sampled_from(["gptq", None]), st.floats(0, 1e9),
    st.lists(st.text(max_size=20), max_size=3), st.floats(1, 1e6),
)  # fmt: skip
def test_json_round_trip(blocks, heldout, form, seconds, notes, perplexity):
    layers = {f"model.layers.{b}.x_proj": synthetic.layer(b, heldout=heldout, notes=notes) for b in range(blocks)}
    one = Quality("base", perplexity, 10, 0.5, "chunks-8", "a text")
    report = synthetic.report().replace(layers=layers, form=form, seconds=seconds, notes=tuple(notes), quality=(one,))
    assert Report.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report


def test_unknown_numbers_are_null_in_json_and_nan_afterwards():
    report = synthetic.report(quality=(Quality("base", math.inf, 10, math.nan, "chunks-8", "one sequence"),))
    values = report.to_dict()
    assert values["quality"][0]["stderr"] is None and values["quality"][0]["perplexity"] is None
    assert math.isnan(Report.from_dict(values).quality[0].stderr)


def test_a_report_without_layers_is_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        synthetic.report(blocks=0)


def test_bits_per_weight_counts_every_stored_bit():
    report = synthetic.report(blocks=2)
    bits = weights = factors = 0
    for layout, metrics in report.layers.values():
        out, columns = layout.shape
        bits += metrics.bits_per_weight * out * columns
        weights += out * columns
        factors += out * metrics.rank + metrics.rank * columns
    assert report.bits_per_weight() == pytest.approx(bits / weights)
    assert report.bits_per_weight(16) == pytest.approx((bits + 16 * factors) / weights)
    assert report.summary()["bits_per_weight_with_adapter"] == pytest.approx((bits + 32 * factors) / weights)


def test_means_and_share_repaired():
    report = synthetic.report(blocks=2)
    before = [m.error_quantized for m in report.metrics()]
    after = [m.error_corrected for m in report.metrics()]
    assert report.mean("error_corrected") == pytest.approx(sum(after) / len(after))
    assert report.repaired() == pytest.approx(1 - sum(after) / sum(before))
    assert report.worst(2)[0][1].error_corrected == max(after)
    assert share_repaired(0.0, 0.0) == 0 and share_repaired(0.1, 0.2) == -1 and share_repaired(None, 0.1) is None


def test_a_mean_is_over_the_layers_that_have_the_metric():
    first, second = synthetic.layer(0), synthetic.layer(1, heldout=False)
    report = synthetic.report().replace(layers={"model.layers.0.a": first, "model.layers.1.a": second})
    assert report.mean("heldout_corrected") == first.metrics.heldout_corrected
    report = report.replace(layers={"model.layers.1.a": second})
    assert report.mean("heldout_corrected") is None and report.repaired(heldout=True) is None


def test_labels_are_short_only_where_nothing_else_is_meant():
    kinds = {"self_attn.q_proj": (8, 4), "mlp.up_proj": (8, 4), "shared.up_proj": (8, 4)}
    assert synthetic.report(1, kinds).kinds() == {
        "self_attn.q_proj": "q_proj", "mlp.up_proj": "mlp.up_proj", "shared.up_proj": "shared.up_proj",
    }  # fmt: skip


def test_experts_are_combined_by_block():
    layers = {f"model.layers.{b}.mlp.experts.{e}.up_proj": synthetic.layer(10 * b + e) for b in range(2) for e in range(3)}
    report = synthetic.report().replace(layers=layers)
    (kind,) = report.kinds()
    seconds = [[layers[f"model.layers.{b}.mlp.experts.{e}.up_proj"].metrics.seconds for e in range(3)] for b in range(2)]
    assert report.by_kind(kind, lambda m: m.seconds) == pytest.approx({b: sum(seconds[b]) / 3 for b in range(2)})
    assert report.by_kind(kind, lambda m: m.seconds, math.fsum) == pytest.approx({b: sum(seconds[b]) for b in range(2)})
    assert report.by_kind(kind, lambda m: None) == {}


@given(st.integers(1, 200), st.integers(0, 1000))
def test_cumulative_shares_of_a_geometric_spectrum_are_exact(rank, seed):
    """Geometric interpolation of a geometric sequence adds nothing and loses nothing, however few of its terms are stored."""
    whole = cumulative_shares(synthetic.layer(seed, rank=rank, points=rank).metrics, exact=False)
    few = cumulative_shares(synthetic.layer(seed, rank=rank).metrics, exact=False)
    assert few == pytest.approx(whole, rel=1e-6) and len(whole) == rank
    assert whole == sorted(whole)


def test_an_exact_spectrum_ends_at_the_share_repaired_and_keeps_what_is_stored():
    metrics = synthetic.layer(3, rank=64).metrics
    bent = replace(metrics, spectrum=tuple(share / (1 + k) for k, share in enumerate(metrics.spectrum)))
    together = cumulative_shares(bent, exact=True)
    assert together[-1] == pytest.approx(share_repaired(bent.error_quantized, bent.error_corrected))
    alone = [b - a for a, b in zip([0.0, *together], together, strict=False)]
    for k, share in stored_spectrum(bent).items():
        assert alone[k] == pytest.approx(share, abs=1e-12)


def test_no_spectrum_no_shares():
    assert cumulative_shares(replace(synthetic.layer().metrics, spectrum=()), exact=True) == []


@pytest.mark.parametrize(
    "settings, said",
    [
        ({}, "GPTQ, 2 bits in groups of 64, asymmetric"),
        ({"quantizer": "rtn", "symmetric": True}, "RTN, 2 bits in groups of 64, symmetric"),
        ({"magr": True}, "GPTQ after MagR, 2 bits in groups of 64, asymmetric"),
    ],
)
def test_the_base_in_words(settings, said):
    assert synthetic.report(spec=run_spec(**settings)).describe_base() == said


def test_local_folders_are_named_without_their_path(tmp_path):
    spec = run_spec(model=str(tmp_path / "my-model"), calib=f"{tmp_path}/a.txt:0.5,c4:0.5")
    report = synthetic.report(spec=spec)
    assert report.model_name() == "my-model"
    assert report.describe_calibration() == f"{128 * 2048:,} tokens of a.txt:0.5, c4:0.5"


def test_the_width_is_that_of_the_layers_and_not_of_the_settings():
    """A given base has not the width of the settings, which nobody set."""
    made = synthetic.report(spec=run_spec(model="owner/tiny-model", bits=8))
    assert made.spec.quant.bits == 8 and made.bits() == 2
    name = next(iter(made.layers))
    wide = made.layers[name]._replace(layout=replace(made.layers[name].layout, bits=4, shape=(4096, 4096)))
    assert replace(made, layers=made.layers | {name: wide}).bits() == 4

import csv
import io
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloq.report import quality_lines, summary_lines, wording
from cloq.report.tables import COLUMNS, from_dense, layers_csv
from cloq.use.evaluate import Quality
from tests.report import synthetic


def test_csv_holds_every_metric_in_full_precision():
    report = synthetic.report()
    rows = list(csv.DictReader(io.StringIO(layers_csv(report))))
    assert [row["name"] for row in rows] == list(report.layers) and tuple(rows[0]) == COLUMNS
    for row, (layout, metrics) in zip(rows, report.layers.values(), strict=True):
        assert (int(row["out"]), int(row["in"])) == layout.shape
        for key in (
            "error_quantized",
            "error_corrected",
            "heldout_quantized",
            "heldout_corrected",
            "seconds",
            "damping",
            "bits_per_weight",
        ):
            assert float(row[key]) == getattr(metrics, key)
        assert [float(share) for share in row["spectrum"].split()] == pytest.approx(metrics.spectrum, rel=1e-5)


def test_csv_leaves_the_unknown_empty_and_quotes_notes():
    layers = {"model.layers.0.a": synthetic.layer(heldout=False, notes=["one, with a comma", 'two "quoted"'])}
    (row,) = csv.DictReader(io.StringIO(layers_csv(synthetic.report().replace(layers=layers))))
    assert row["heldout_corrected"] == "" and row["notes"] == 'one, with a comma; two "quoted"'


def test_summary_names_the_worst_three_in_order_and_the_files():
    report = synthetic.report(blocks=4)
    lines = summary_lines(report, Path("out"))
    expected = sorted(report.layers, key=lambda name: -report.layers[name].metrics.error_corrected)[:3]
    assert [line.split()[-1] for line in lines if "model.layers" in line] == expected
    for file in ("model", "adapter", "report.html", "run.yaml"):
        assert any(line.endswith(str(Path("out") / file)) for line in lines)
    assert not any(line.startswith("held-out") for line in summary_lines(report.replace(layers={"a": synthetic.layer(heldout=False)})))


def test_summary_counts_layers_with_notes_once():
    layers = {"model.layers.0.a": synthetic.layer(notes=["x", "y"]), "model.layers.1.a": synthetic.layer(notes=["x"])}
    assert any("2 layers where the code changed course" in line for line in summary_lines(synthetic.report().replace(layers=layers)))
    assert not any("changed course" in line for line in summary_lines(synthetic.report()))


def test_quality_never_mixes_texts_or_protocols():
    lines = quality_lines([*synthetic.quality("one"), *synthetic.quality("two", 2.0)])
    heads = [line for line in lines if line.startswith("perplexity on")]
    assert [head.split()[2] for head in heads] == ["one", "two"] and len(lines) == 10


def test_how_far_the_adapter_is_from_the_16_bit_model_does_not_depend_on_the_base_alone():
    def rows(**values):
        return [Quality(name.replace("_", " + ").replace("dense", "16-bit"), value, 1, 0.1, "p", "t") for name, value in values.items()]

    for base in (9.0, 5e9, math.inf):
        assert from_dense(rows(dense=10.0, base=base, base_adapter=12.5)) == "1.250 times the 16-bit model's"
    assert from_dense(rows(dense=10.0, base=20.0, base_adapter=9.9)) == "0.990 times the 16-bit model's"
    assert from_dense(rows(dense=10.0, base_adapter=98765.4)) == "9,876.540 times the 16-bit model's"
    assert from_dense(rows(dense=10.0, base=20.0)) is None and from_dense(rows(base=20.0, base_adapter=12.0)) is None


@pytest.mark.parametrize(
    "written, said",
    [
        (wording.error(0.04312), "0.0431"), (wording.error(0.1), "0.100"), (wording.error(4.3e-6), "4.3e-06"),
        (wording.error(None), "–"),
        (wording.percent(0.528), "53 %"), (wording.percent(-0.4), "−40 %"), (wording.perplexity(24.13), "24.13"),
        (wording.perplexity(4227.3), "4,227"), (wording.perplexity(math.inf), "–"), (wording.size(87_663_056), "87.7 MB"),
        (wording.size(999), "999 B"), (wording.size(999_999), "1 MB"),
        (wording.duration(0.421), "0.42 s"), (wording.duration(161.4), "2 min 41 s"),
        (wording.duration(11_100), "3 h 05 min"), (wording.plural(1, "layer"), "1 layer"),
        (wording.plural(1200, "layer"), "1,200 layers"),
        (wording.short_count(106_168_320), "106 M"), (wording.short_count(7_240_000_000), "7.24 B"),
        (wording.source("/a/b/c.txt:0.5,c4"), "c.txt:0.5, c4"), (wording.source("Salesforce/wikitext"), "Salesforce/wikitext"),
    ],
)  # fmt: skip
def test_wording(written, said):
    assert written == said


@given(st.integers(1, 10**15))
def test_a_written_size_is_right_to_half_a_percent(value):
    number, unit = wording.size(value).split()
    factor = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(number) * factor == pytest.approx(value, rel=6e-3)

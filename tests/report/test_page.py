import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import yaml

from cloq.report import drawing, figures
from cloq.report.card import model_card
from cloq.report.page import page
from cloq.specs import run_spec
from tests.report import synthetic

HOSTILE = '<img src=x onerror="alert(1)">$\\frac{1}{2}$ | `a`'


class _Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.open, self.attributes, self.tags, self.text = [], [], set(), []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def _hostile_report():
    layers = {f"model.layers.{b}.{HOSTILE}": synthetic.layer(b, notes=[HOSTILE]) for b in range(2)}
    spec = run_spec(model=HOSTILE, calib=HOSTILE)
    report = synthetic.report(spec=spec, quality=synthetic.quality(HOSTILE), notes=(HOSTILE,), versions={HOSTILE: HOSTILE})
    return report.replace(layers=layers, phases={HOSTILE: 1.0})


@pytest.mark.parametrize("make", [synthetic.report, _hostile_report], ids=["plain", "hostile"])
def test_the_page_is_one_well_formed_file_that_asks_for_nothing(make):
    text = page(make())
    parsed = _Tags(text)
    assert parsed.open == [] and not parsed.tags & {"script", "img", "iframe", "object", "form"}
    assert not any(name.startswith("on") for name, _ in parsed.attributes)
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for name, value in parsed.attributes:
        if name in ("href", "xlink:href", "src"):
            assert value == "data:," or value.removeprefix("#") in ids
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids) and "@import" not in text


def test_what_comes_from_outside_arrives_as_text():
    text = "".join(_Tags(page(_hostile_report())).text)
    assert text.count(HOSTILE) >= 8  # title, lead, quality, worst layers, notes, settings, versions, all layers


def test_every_colour_comes_from_the_page():
    text = page(synthetic.report())
    assert not any(color in text for color in drawing._VARIABLES)
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", text))
    assert used <= set(re.findall(r"--([a-z0-9-]+):", text)) and {"ink", "before", "after", "series-3"} <= used


def test_equal_reports_give_equal_pages():
    assert page(synthetic.report()) == page(synthetic.report())


@pytest.mark.parametrize("blocks", [1, 80])
def test_every_layer_is_on_the_page_whatever_the_depth(blocks):
    report = synthetic.report(blocks)
    text = page(report)
    assert all(name in text for name in report.layers)


def test_a_page_without_heldout_quality_spectrum_or_phases():
    layers = {"model.layers.0.a": synthetic.layer(heldout=False)}
    layers = {n: s._replace(metrics=replace(s.metrics, spectrum=(), error_corrected=0.0)) for n, s in layers.items()}
    text = page(synthetic.report(quality=(), phases={}, sizes={}, peak_memory={}).replace(layers=layers))
    for absent in ("held-out", "Held-out", "Perplexity", "Spectrum", "Size on disk", "nan"):
        assert absent not in text
    assert _Tags(text).open == []


def test_an_adapter_that_adds_to_the_error_is_red():
    worse = synthetic.layer(0)
    metrics = replace(worse.metrics, heldout_corrected=2 * worse.metrics.heldout_quantized)
    report = synthetic.report(1)
    assert "var(--bad)" not in figures.repaired(report) and "Red:" not in page(report)
    report = report.replace(layers=report.layers | {"model.layers.0.mlp.up_proj": worse._replace(metrics=metrics)})
    assert "var(--bad)" in figures.repaired(report) and "Red:" in page(report)


def test_damping_is_drawn_only_where_it_differs():
    report = synthetic.report(2)
    assert figures.damping(report) is None and "0.01 in every layer" in page(report)
    raised = synthetic.layer(0, damping=0.1, notes=["Cholesky failed with damping 0.01; raised to 0.1"])
    changed = report.replace(layers=report.layers | {"model.layers.1.mlp.up_proj": raised})
    assert figures.damping(changed) is not None and "raised to 0.1" in page(changed) and "Nowhere" not in page(changed)


def test_the_error_panels_show_every_block():
    """Each line has as many points as there are blocks: nothing is dropped on the way into the picture."""
    drawn = figures.errors(synthetic.report(blocks=7, kinds={"attn.a_proj": (8, 4)}))
    dashes = r"(?:-dasharray[^;]*; stroke-dashoffset: 0; stroke)?"
    lines = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: none; stroke{dashes}: var\(--(?:before|after)\)', drawn)
    assert sorted(len(re.findall("[ML]", path)) for path in lines)[-4:] == [7, 7, 7, 7]


def _front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_of_a_mixture_does_not_lead_to_random_experts():
    kinds = {"self_attn.q_proj": (96, 64), "mlp.experts.0.up_proj": (96, 64), "mlp.experts.1.up_proj": (96, 64)}
    card = model_card(synthetic.report(kinds=kinds))
    assert "from_pretrained" not in card and 'cloq.load(".", trainable=True)' in card and "random ones" in card


def test_the_card_says_what_it_is_and_how_to_load_it():
    report = synthetic.report()
    card = model_card(report)
    assert _front_matter(card)["base_model"] == "owner/tiny-model" and "2-bit" in _front_matter(card)["tags"]
    for said in ("PeftModel.from_pretrained", "is_trainable=True", "cloq.load", "cloq quantize --config run.yaml", "cloq[gptq]"):
        assert said in card
    for number in ("4,227", "270.4", f"{report.bits_per_weight():.2f}", f"{report.bits_per_weight(16):.2f}", "87.7 MB"):
        assert number in card


def test_the_card_names_no_local_path(tmp_path):
    spec = run_spec(model=str(tmp_path / "my-model"), calib=str(tmp_path / "text.txt"))
    card = model_card(synthetic.report(spec=spec, quality=synthetic.quality(str(tmp_path / "eval.txt"))))
    assert str(tmp_path) not in card and "my-model" in card and "base_model" not in _front_matter(card)


def test_the_card_of_a_given_base_asks_for_it():
    card = model_card(synthetic.report(form=None))
    assert 'from_pretrained("BASE"' in card and '"model"' not in card


def test_hostile_names_cannot_break_the_card():
    card = model_card(_hostile_report())
    assert _front_matter(card)["library_name"] == "peft" and "<img" not in card.replace("\\<img", "")
    tables = [line for line in card.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} <= {3, 5}

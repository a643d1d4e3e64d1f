"""Settings: every valid one survives JSON, every invalid one is refused with what is allowed."""

import dataclasses
import json
import math
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cloq import specs
from cloq.errors import CloqError, SpecError
from cloq.specs import (
    BITS,
    EFFORTS,
    FLAT,
    GROUP_SIZES,
    CalibSpec,
    LayerSpec,
    LoraSpec,
    QuantSpec,
    Rule,
    RunSpec,
    layer_spec,
    matches,
    run_spec,
)

TEXT = st.text(min_size=1, max_size=12).filter(str.strip)
MAGR = st.fixed_dictionaries({"magr": st.just(True), "magr_alpha": st.none() | st.floats(1e-6, 1)}) | st.just({})
GRID = st.fixed_dictionaries(
    {
        "bits": st.sampled_from(BITS),
        "group_size": st.sampled_from(GROUP_SIZES),
        "symmetric": st.booleans(),
        "search": st.booleans(),
    }
)
GPTQ = st.fixed_dictionaries({"damping": st.floats(0, 1), "act_order": st.booleans(), "static_groups": st.booleans()})
QUANT = st.one_of(
    st.builds(lambda magr: QuantSpec(bits=4, group_size=64, quantizer="nf4", **magr), MAGR),
    st.builds(lambda magr, grid: QuantSpec(quantizer="rtn", **magr, **grid), MAGR, GRID),
    st.builds(lambda magr, grid, gptq: QuantSpec(quantizer="gptq", **magr, **grid, **gptq), MAGR, GRID, GPTQ),
)
LORA = st.one_of(
    st.builds(LoraSpec, init=st.sampled_from(specs.INITIALIZER_NAMES), rank=st.integers(1, 4096)),
    st.builds(LoraSpec, init=st.just("cloq"), rank=st.integers(1, 4096), split=st.sampled_from(specs.SPLIT_NAMES)),
    st.builds(LoraSpec, init=st.just("loftq"), rank=st.integers(1, 4096), iterations=st.integers(1, 100)),
)
CALIB = st.builds(
    CalibSpec,
    source=TEXT,
    samples=st.integers(1, 10**6),
    seq_len=st.integers(8, 10**6),
    heldout=st.floats(1e-3, 1),  # without any, the correction cannot be chosen
    column=st.none() | TEXT,
    seed=st.integers(0, 2**31),
)
RULES = st.builds(
    Rule,
    match=TEXT,
    bits=st.none() | st.sampled_from(BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    rank=st.none() | st.integers(1, 4096),
    dense=st.booleans(),
)
PATTERNS = st.lists(TEXT, max_size=3).map(tuple)
RUNS = st.builds(
    RunSpec,
    model=TEXT,
    revision=st.none() | TEXT,
    quant=QUANT,
    lora=LORA,
    calib=CALIB,
    only=PATTERNS,
    skip=PATTERNS,
    rules=st.lists(RULES, max_size=3).map(tuple),
    propagate=st.sampled_from(specs.PROPAGATE),
    sequential=st.booleans(),
    device=st.sampled_from(("auto", "cpu", "cuda:1")),
    batch_tokens=st.integers(1, 10**6),
    trust_remote_code=st.booleans(),
)


@given(RUNS)
@settings(max_examples=200, deadline=None)
def test_a_run_survives_json_and_yaml(spec):
    plain = spec.to_dict()
    assert RunSpec.from_dict(json.loads(json.dumps(plain))) == spec
    assert RunSpec.from_dict(yaml.safe_load(yaml.safe_dump(plain))) == spec
    assert RunSpec.from_dict(plain).to_dict() == plain


@given(RUNS)
@settings(max_examples=50, deadline=None)
def test_flat_settings_say_the_same_run(spec):
    """What the command line would be given, one flag per setting."""
    plain = spec.to_dict()
    flat = {name: (plain[section] if section else plain)[key] for name, (section, key) in FLAT.items()}
    assert run_spec(**flat) == spec
    assert run_spec(spec) == spec


def test_every_setting_has_a_flat_name():
    covered = set(FLAT.values())
    for section, kind in (("quant", QuantSpec), ("lora", LoraSpec), ("calib", CalibSpec)):
        assert {(section, f.name) for f in dataclasses.fields(kind)} <= covered
    assert {("", f.name) for f in dataclasses.fields(RunSpec)} - covered <= {("", s) for s in ("quant", "lora", "calib")}


@given(st.sampled_from((RunSpec, QuantSpec, LoraSpec, CalibSpec, Rule)), TEXT)
@settings(max_examples=60, deadline=None)
def test_unknown_keys_are_refused_by_name(kind, key):
    if key in {f.name for f in dataclasses.fields(kind)}:
        return
    with pytest.raises(SpecError) as refusal:
        kind.from_dict({key: 1})
    assert re.search(rf"unknown setting {re.escape(repr(key))}( \(meant: \w+\?\))? in {kind.__name__}; known: ", str(refusal.value))


def test_unknown_keys_are_found_at_any_depth():
    with pytest.raises(SpecError, match=r"unknown setting 'bitz' \(meant: bits\?\) in QuantSpec; known: bits, group_size, "):
        RunSpec.from_dict({"quant": {"bitz": 2}})
    with pytest.raises(SpecError, match=r"unknown setting 'dens' \(meant: dense\?\) in Rule"):
        RunSpec.from_dict({"rules": [{"match": "a", "dens": True}]})
    with pytest.raises(SpecError, match=r"unknown setting 'bit' \(meant: bits\?\), 'ranks' \(meant: rank\?\); known: .*bits.*rank"):
        run_spec(ranks=4, bit=2)


REFUSED = {
    "bits": (lambda: QuantSpec(bits=5), "bits is 5; allowed: 2, 3, 4, 8"),
    "group size": (lambda: QuantSpec(group_size=48), "group_size is 48; allowed: 32, 64, 128, channel"),
    "quantizer": (lambda: QuantSpec(quantizer="awq"), "quantizer is 'awq'; allowed: gptq, rtn, nf4"),
    "nf4 bits": (lambda: QuantSpec(bits=2, quantizer="nf4"), "4-bit codebook; bits is 2. Use --bits 4, or --quantizer gptq"),
    "nf4 group": (lambda: QuantSpec(bits=4, group_size=32, quantizer="nf4"), "blocks of 64 values; set group_size to 64"),
    "damping": (lambda: QuantSpec(damping=-0.1), "damping is -0.1; .* between 0 and 1"),
    "damping that is none": (lambda: QuantSpec(damping=float("nan")), "damping is nan"),
    "alpha": (lambda: QuantSpec(magr=True, magr_alpha=0.0), "magr_alpha is 0.0; it must be positive"),
    "alpha without MagR": (lambda: QuantSpec(magr_alpha=1e-3), "magr_alpha is 0.001, but magr is off"),
    "init": (lambda: LoraSpec(init="lora"), "init is 'lora'; allowed: cloq, zero, svd, loftq, qera, eora, pissa"),
    "rank": (lambda: LoraSpec(rank=0), "rank is 0; allowed: 1 to 4096"),
    "split": (lambda: LoraSpec(split="even"), "split is 'even'; allowed: paper, balanced"),
    "iterations": (lambda: LoraSpec(iterations=0), "iterations is 0; allowed: 1 to 100"),
    "source": (lambda: CalibSpec(source=" "), "calibration source is empty; name one, such as --calib"),
    "samples": (lambda: CalibSpec(samples=0), "samples is 0; allowed: 1 to"),
    "sequence": (lambda: CalibSpec(seq_len=4), "seq_len is 4; allowed: 8 to"),
    "held out": (lambda: CalibSpec(heldout=1.5), "heldout is 1.5; it is a share"),
    "pattern": (lambda: Rule(""), "a rule needs a pattern"),
    "rule bits": (lambda: Rule("q_proj", bits=7), "rule 'q_proj': bits is 7; allowed: 2, 3, 4, 8"),
    "rule rank": (lambda: Rule("q_proj", rank=0), "rule 'q_proj': rank is 0"),
    "rule group": (lambda: Rule("q_proj", group_size=5), "rule 'q_proj': group_size is 5"),
    "propagate": (lambda: RunSpec(propagate="none"), "propagate is 'none'; allowed: adapter, quantized, dense"),
    "model": (lambda: RunSpec(model=""), "model is empty; name a hub id or a folder"),
    "batch": (lambda: RunSpec(batch_tokens=0), "batch_tokens is 0"),
    "text for a number": (lambda: QuantSpec.from_dict({"bits": "2"}), r"QuantSpec.bits needs int, got '2'"),
    "truth for a number": (lambda: LoraSpec.from_dict({"rank": True}), "LoraSpec.rank needs int, got True"),
    "a fraction for a count": (lambda: LoraSpec.from_dict({"rank": 1.5}), "LoraSpec.rank needs int, got 1.5"),
    "number for truth": (lambda: QuantSpec.from_dict({"magr": 1}), "QuantSpec.magr needs bool, got 1"),
    "null": (lambda: QuantSpec.from_dict({"bits": None}), "QuantSpec.bits needs int, got None"),
    "text for a list": (lambda: RunSpec.from_dict({"only": "q_proj"}), "RunSpec.only needs a list, got 'q_proj'"),
    "a list for a section": (lambda: RunSpec.from_dict({"quant": [2]}), "QuantSpec needs a mapping, got list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_came_and_what_is_allowed(name):
    make, message = REFUSED[name]
    with pytest.raises(SpecError, match=message) as refusal:
        make()
    assert isinstance(refusal.value, CloqError) and isinstance(refusal.value, ValueError)


IGNORED = {
    "nf4": {"symmetric": True, "search": False, "damping": 0.02, "act_order": True, "static_groups": True},
    "rtn": {"damping": 0.02, "act_order": True, "static_groups": True},
    "gptq": {},
}


@pytest.mark.parametrize("quantizer", specs.QUANTIZER_NAMES)
@pytest.mark.parametrize("name", sorted(IGNORED["nf4"]))
def test_a_setting_that_the_quantizer_does_not_have_is_refused(quantizer, name):
    base = {"quantizer": quantizer, "bits": 4}
    value = IGNORED["nf4"][name]
    if name not in IGNORED[quantizer]:
        assert getattr(QuantSpec(**base, **{name: value}), name) == value
        return
    with pytest.raises(SpecError, match=f"{name} is {value}, which quantizer '{quantizer}' does not have; .* or use quantizer gptq"):
        QuantSpec(**base, **{name: value})
    default = getattr(QuantSpec(), name)
    assert getattr(QuantSpec(**base, **{name: default}), name) == default, "saying the default is no mistake"


@pytest.mark.parametrize("init", specs.INITIALIZER_NAMES)
@pytest.mark.parametrize(("name", "value", "owner"), [("split", "paper", "cloq"), ("iterations", 2, "loftq")])
def test_a_setting_that_the_initializer_does_not_have_is_refused(init, name, value, owner):
    if init == owner:
        assert getattr(LoraSpec(init=init, **{name: value}), name) == value
        return
    with pytest.raises(SpecError, match=f"{name} is {value}, which init '{init}' does not have; .* or use init {owner}"):
        LoraSpec(init=init, **{name: value})


def test_the_lists_of_settings_are_what_the_classes_have():
    """A field of `QuantSpec` or `LoraSpec` reaches exactly those algorithms that have a field of the same name."""
    from cloq.initializers import INITIALIZERS
    from cloq.quantizers import QUANTIZERS

    for listed, classes, common in (
        (specs.QUANTIZER_SETTINGS, QUANTIZERS, {"bits", "group_size", "quantizer", "magr", "magr_alpha"}),
        (specs.INITIALIZER_SETTINGS, INITIALIZERS, {"init", "rank"}),
    ):
        kind = QuantSpec if classes is QUANTIZERS else LoraSpec
        assert set(listed) | common == {f.name for f in dataclasses.fields(kind)}
        for name, owners in listed.items():
            assert {key for key, cls in classes.items() if name in cls.__dataclass_fields__} == set(owners), name


def test_rules_cannot_make_of_nf4_what_it_is_not():
    run = run_spec(quantizer="nf4", bits=4, rules=(Rule("q_proj", bits=2), Rule("up_proj", group_size=32), Rule("k_proj", rank=8)))
    for name, message in (("q_proj", "nf4 is a 4-bit codebook; bits is 2"), ("up_proj", "nf4 uses blocks of 64")):
        with pytest.raises(SpecError, match=message):
            layer_spec(run, name)
    assert layer_spec(run, "k_proj") == LayerSpec(run.quant, 8)
    assert layer_spec(run_spec(quantizer="rtn", rules=(Rule("q_proj", bits=3),)), "q_proj").quant == QuantSpec(bits=3, quantizer="rtn")


def test_whole_numbers_stand_for_fractions():
    assert QuantSpec.from_dict({"damping": 0}).damping == 0.0
    assert type(QuantSpec.from_dict({"damping": 1, "magr": True, "magr_alpha": 1}).magr_alpha) is float


def test_specs_are_values():
    assert QuantSpec() == QuantSpec() and hash(RunSpec()) == hash(RunSpec())
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec().bits = 3
    assert QuantSpec().replace(bits=3) == QuantSpec(bits=3)
    with pytest.raises(SpecError, match="bits is 6"):
        QuantSpec().replace(bits=6)


@pytest.mark.parametrize("heldout, samples, expected", [(0.0, 100, 0), (0.125, 128, 16), (0.001, 128, 1), (0.1, 128, 13), (1.0, 5, 5)])
def test_the_held_out_share_is_rounded_up(heldout, samples, expected):
    assert CalibSpec(samples=samples, heldout=heldout).heldout_samples == expected


NAME = "model.layers.10.self_attn.q_proj"


@pytest.mark.parametrize("pattern", [NAME, "q_proj", "self_attn.*", "*.layers.10.*", "self_attn.[qk]_proj", "model.*", "layers.10.*"])
def test_patterns_that_match(pattern):
    assert matches(pattern, NAME)


@pytest.mark.parametrize("pattern", ["proj", "_proj", "Q_proj", "layers.1.*", "self_attn", "o_proj", "attn.q_proj"])
def test_patterns_that_do_not(pattern):
    assert not matches(pattern, NAME)


def test_rules_resolve_setting_by_setting_and_the_last_wins():
    run = RunSpec(
        quant=QuantSpec(bits=2, group_size=64),
        lora=LoraSpec(rank=16),
        skip=("lm_head",),
        rules=(
            Rule("self_attn.*", bits=4, rank=8),
            Rule("q_proj", bits=3),
            Rule("k_proj", group_size=32),
            Rule("layers.0.*", dense=True),
        ),
    )
    assert layer_spec(run, NAME) == LayerSpec(QuantSpec(bits=3, group_size=64), 8)
    assert layer_spec(run, NAME.replace("q_proj", "k_proj")) == LayerSpec(QuantSpec(bits=4, group_size=32), 8)
    assert layer_spec(run, "model.layers.10.mlp.up_proj") == LayerSpec(QuantSpec(bits=2, group_size=64), 16)
    assert layer_spec(run, "model.layers.0.mlp.up_proj").dense and layer_spec(run, "lm_head").dense
    only = run.replace(only=("mlp.*",), rules=())
    assert layer_spec(only, NAME).dense and not layer_spec(only, "model.layers.1.mlp.up_proj").dense


def test_a_single_pattern_may_be_a_string():
    assert run_spec(only="q_proj").only == ("q_proj",)
    assert run_spec(rules=(Rule("a", bits=3),)).rules == (Rule("a", bits=3),)
    assert run_spec(run_spec(bits=3), rank=8).quant.bits == 3


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: QuantSpec(magr=True, magr_alpha=math.inf), "positive and finite"),
        (lambda: QuantSpec(magr=True, magr_alpha=math.nan), "positive and finite"),
        (lambda: QuantSpec(damping=math.nan), "damping is nan"),
        (lambda: CalibSpec(heldout=math.nan), "heldout is nan"),
        (lambda: CalibSpec(seed=2**64), "64 bits"),
        (lambda: CalibSpec(seed=-(10**5000)), "a number of 16610 bits"),
        (lambda: CalibSpec.from_dict({"samples": 10**5000}), "a number of 16610 bits"),
        (lambda: QuantSpec.from_dict({"damping": 10**5000}), "a number of 16610 bits"),
    ],
)
def test_numbers_that_no_computer_can_use(make, said):
    with pytest.raises(SpecError, match=said):
        make()


def test_a_message_shows_no_more_of_a_value_than_a_person_reads():
    laughs = ["ha"]
    for _ in range(60):
        laughs = [laughs] * 9  # a few hundred bytes of YAML, 9^60 words in full
    with pytest.raises(SpecError, match="model needs str") as caught:
        RunSpec.from_dict({"model": laughs})
    with pytest.raises(SpecError, match="init is 'xxx"):
        LoraSpec(init="x" * 10_000)
    with pytest.raises(SpecError, match=r"unknown setting 'a', 1, None"):
        RunSpec.from_dict({1: 2, "a": 3, None: 4})
    with pytest.raises(SpecError, match=r"'b109' and 101 more in RunSpec") as many:
        RunSpec.from_dict({f"b{i}": i for i in range(100, 210)} | {"y" * 10**6: 1})
    assert len(str(many.value)) < 1000
    assert len(str(caught.value)) < 500


def test_effort_lies_between_the_defaults_and_what_is_said():
    for effort, values in EFFORTS.items():
        assert run_spec(effort=effort) == run_spec(**values)
    assert run_spec(effort="best").lora.rounds > run_spec().lora.rounds > run_spec(effort="fast").lora.rounds
    assert run_spec(effort="best", rounds=3).lora.rounds == 3
    assert run_spec(run_spec(bits=3, rounds=2), effort="best") == run_spec(bits=3, effort="best")
    assert run_spec(effort="fast", init="svd") == run_spec(init="svd", correction=0.0)  # which has neither rounds nor `fisher`
    assert run_spec(run_spec(init="eora"), effort="best") == run_spec(init="eora")
    with pytest.raises(SpecError, match="effort is 'heroic'; allowed: published, fast, default, best"):
        run_spec(effort="heroic")


def test_correction_goes_with_what_later_layers_see():
    assert run_spec().corrects and run_spec(propagate="quantized").corrects
    assert not run_spec(propagate="dense").corrects and not run_spec(correction=0.0).corrects
    for value in (-0.1, 1.5, float("nan")):
        with pytest.raises(SpecError, match="correction is"):
            run_spec(correction=value)


def test_the_correction_is_chosen_where_it_is_not_given():
    assert run_spec().chooses_correction and not run_spec(correction=0.5).chooses_correction
    assert not run_spec(propagate="dense", heldout=0.0).chooses_correction and run_spec(correction=0.5, heldout=0.0).corrects
    with pytest.raises(SpecError, match=r"chosen on held-out text, and heldout is 0; give .* --heldout 0\.125, or .* --correction 0\.5"):
        run_spec(heldout=0.0)


@pytest.mark.parametrize(
    "asked, base_is_given, scale",
    [({}, False, 1 / 16), ({}, True, 1.0), ({"rounds": 0}, False, 1.0), ({"split": "paper"}, False, 1.0), ({"init": "qera"}, False, 1.0)],
    ids=str,
)
def test_factors_that_hold_most_of_the_weight_get_a_smaller_scale(asked, base_is_given, scale):
    assert LoraSpec(**asked).scale_on(base_is_given) == scale

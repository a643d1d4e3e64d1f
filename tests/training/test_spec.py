"""What can be asked: validated on construction, an exact round trip, recipes under what was given."""

import pytest

from cloq.errors import SpecError
from cloq.specs import RunSpec
from cloq.training import TrainSpec, train_spec
from cloq.training.recipes import FAMILIES, RECIPES
from cloq.training.spec import template_columns


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_valid_spec_and_says_its_name(name):
    spec = train_spec(recipe=name)
    assert spec.recipe == name and all(getattr(spec, key) == value for key, value in RECIPES[name].items())
    assert TrainSpec.from_dict(spec.to_dict()) == spec


def test_what_is_given_wins_over_the_recipe_and_the_recipe_over_the_file():
    file = TrainSpec(lr=5e-5, epochs=1.0, seed=7)
    spec = train_spec(file, recipe="gsm8k-2bit", epochs=2.0)
    assert (spec.lr, spec.epochs, spec.seed) == (RECIPES["gsm8k-2bit"]["lr"], 2.0, 7)


@pytest.mark.parametrize(("bits", "named"), [(2, "gsm8k-2bit"), (3, "gsm8k-3bit"), (8, "gsm8k-4bit"), (None, "gsm8k-4bit")])
def test_a_family_alone_takes_the_width_of_the_base(bits, named):
    assert train_spec(bits=bits, recipe="gsm8k").recipe == named


def test_two_bits_learn_no_faster():
    for family in FAMILIES:
        assert RECIPES[f"{family}-2bit"]["lr"] <= RECIPES[f"{family}-4bit"]["lr"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"packing": "tight"}, "packing is 'tight'; allowed: auto, none, rows, stream"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; allowed: adamw"),
        ({"precision": "fp16"}, "allowed: auto, bf16, float32"),
        ({"lr": 3.0}, "lr is 3.0"),
        ({"epochs": 0.0}, "epochs is 0.0"),
        ({"steps": 0}, "steps is 0"),
        ({"warmup": 1.0}, "warmup is 1.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"save_limit": 0}, "save_limit is 0"),
        ({"eval_every": -1}, "eval_every is -1"),
        ({"eval_every": 1}, "eval_every is 1, but there is nothing to evaluate on; give --eval-data or --eval-share"),
        ({"seed": -1}, "seed is -1; allowed: 0 to 4294967295"),
        ({"seed": 1 << 32}, "seed is 4294967296; allowed: 0 to 4294967295"),
        ({"eval_data": "x", "eval_share": 0.1}, "exclude each other"),
        ({"template": "no column"}, "names no column"),
        ({"template": "{a"}, "cannot be read"),
        ({"template": "{a.b}"}, "nothing else"),
        ({"template": "{}"}, "nothing else"),
        ({"column": "a", "template": "{b}"}, "exclude each other"),
        ({"prompt_column": "a", "template": "{b}"}, "prompt_column and template exclude each other"),
        ({"context_column": "a", "template": "{b}"}, "context_column and template exclude each other"),
        ({"column": "a", "answer_column": "b"}, "leave out the columns"),
        ({"report_to": "excel"}, "report_to is 'excel'"),
        ({"recipe": "gsm9k"}, "unknown recipe 'gsm9k'; known: wikitext2-2bit"),
        ({"bitz": 2}, "unknown setting 'bitz'"),
    ],
)
def test_refusals(settings, said):
    with pytest.raises(SpecError, match=said):
        train_spec(**settings)


def test_columns_of_a_template():
    assert template_columns("{a} {{b}} {c}{a}") == ("a", "c")


def test_a_run_is_not_a_training():
    with pytest.raises(SpecError, match="unknown setting"):
        TrainSpec.from_dict(RunSpec().to_dict())

"""What a format cannot hold is refused before anything is written: what came, what is allowed, what to do."""

from __future__ import annotations

import re

import pytest

from cloq.errors import ExportError
from cloq.export import FORMATS, Contents, Dense
from cloq.types import WeightLayout

NAME = "model.layers.0.mlp.up_proj"


def contents(*layouts: WeightLayout, **more) -> Contents:
    return Contents({f"{NAME}{i or ''}": layout for i, layout in enumerate(layouts)}, ("lm_head",), "model.layers", "float16", **more)


def integer(bits=2, shape=(96, 64), group_size=32, symmetric=False, permuted=False) -> WeightLayout:
    return WeightLayout("integer", shape, bits, group_size, symmetric, permuted)


NF4 = WeightLayout("codebook", (96, 64), 4, 64, False, False)

REFUSED = [
    ("gptq", contents(NF4), "has a codebook (4-bit nf4), which GPTQ files cannot hold; use --format nf4 or dense"),
    ("gptq", contents(integer(shape=(96, 48))), "multiples of 32. Leave it dense with --skip up_proj, or use --format"),
    ("gptq", contents(integer(shape=(100, 64))), "multiples of 32"),
    ("container", contents(NF4), "has a codebook"),
    ("container", contents(integer(4)), "has 4 bits, asymmetric: code − zero does not fit in −8…7"),
    ("container", contents(integer(8, symmetric=True)), "has 8 bits, symmetric"),
    ("container", contents(integer(2, group_size=128)), "which groups of 128 do not divide, and no server takes that"),
    ("container", contents(integer(2), integer(3, group_size=64)), "this run has groups of 32, 64, and a container has one"),
    ("container", contents(integer(2), integer(2, group_size=None)), "groups of 32, a channel"),
    ("compressed-tensors", contents(NF4), "which pack-quantized files cannot hold"),
    ("compressed-tensors", contents(integer(group_size=128)), "which groups of 128 do not divide"),
    ("compressed-tensors", contents(integer(permuted=True)), "no longer reads; quantize with --static-groups or without --act-order"),
    ("compressed-tensors", contents(integer(), conv1d=frozenset([NAME])), "is a Conv1D, which compressed-tensors does not load"),
    ("compressed-tensors", contents(integer(), fused=("model.layers.0.mlp.experts.down_proj",)), "experts.down_proj in pieces"),
    ("nf4", contents(integer(4)), "is on an integer grid of 4 bits, whose levels NF4's codebook does not have"),
    ("nf4", contents(WeightLayout("codebook", (64, 96), 4, 64, False, False)), "has 96 inputs, so that blocks of 64 straddle rows"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "what", "message"), REFUSED)
def test_refused(form, what, message):
    with pytest.raises(ExportError, match=re.escape(message)):
        FORMATS[form]().check(what)


@pytest.mark.parametrize(
    ("form", "what"),
    [
        ("gptq", contents(integer(2, permuted=True))),
        ("gptq", contents(integer(8, group_size=128, symmetric=True))),
        ("gptq", contents(integer(2), integer(3, group_size=None), integer(4, group_size=64))),
        ("container", contents(integer(2), integer(3), integer(4, symmetric=True))),
        ("container", contents(integer(3, group_size=None))),
        ("compressed-tensors", contents(integer(2), integer(8, group_size=None), integer(4, (90, 64), 64, True))),
        ("nf4", contents(NF4)),
        ("dense", contents(NF4, integer(3, (7, 5), None), integer(2, permuted=True))),
    ],
)
def test_taken(form, what):
    FORMATS[form]().check(what)


def test_a_dense_export_names_its_precisions():
    with pytest.raises(ExportError, match="dtype is 'float8'; a dense export takes bfloat16, float16, float32"):
        Dense("float8")

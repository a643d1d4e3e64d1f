"""AutoRound's own folders decode to the codes that are in them, however they are packed; what is no integer weight is refused.

The packings were compared with what AutoRound 0.16.1 itself computes from folders that it wrote (docs/formats.md); here GPTQ's are made of
our GPTQ export, and AWQ's by GPTQModel's packing where it is installed and code by code where it is not.
"""

from __future__ import annotations

import re

import pytest
import torch

from cloq.algebra import packing
from cloq.errors import ExportError
from cloq.export.read import QuantizedFolder, reader_of
from cloq.quantizers import Rtn
from cloq.use.check import check_base
from cloq.use.loading import require_libraries
from tests.finished import Finished, edit_json, edit_tensors, finish, logits, needs, streamed_logits

CONFIG = {"quant_method": "auto-round", "data_type": "int", "block_name_to_quantize": "model.layers", "iters": 200}


def auto_round(run: Finished, packed: str, extra: dict | None = None, **settings):
    """The run's GPTQ export as AutoRound would have written it."""
    folder = run.export("gptq")
    config = CONFIG | {"packing_format": packed} | ({"extra_config": extra} if extra else {}) | settings
    edit_json(folder / "config.json", lambda c: c.update(quantization_config={"bits": 2, "group_size": 32, "sym": False} | config))
    edit_tensors(folder / "model.safetensors", lambda tensors: repack(tensors, run, packed))
    return folder


def repack(tensors: dict, run: Finished, packed: str) -> None:
    for name, result in run.results.items():
        weight = result.weight
        if packed != "auto_round:gptqmodel":
            tensors.pop(f"{name}.g_idx")
        if packed == "auto_round:auto_gptq":
            tensors[f"{name}.qzeros"] = packing.pack((weight.zero.T.int() - 1) % 2**weight.bits, weight.bits)
        if packed == "auto_round:auto_awq":
            tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"] = awq(weight.codes), awq(weight.zero)


def awq(codes: torch.Tensor) -> torch.Tensor:
    """`(out, n)` codes of 4 bits → `(n, out/8)` words, code by code."""
    order, (out, n) = [0, 2, 4, 6, 1, 3, 5, 7], codes.shape
    words = [[sum(int(codes[8 * w + order[i], k]) << (4 * i) for i in range(8)) for w in range(out // 8)] for k in range(n)]
    return torch.tensor(words, dtype=torch.int64).where(torch.tensor(words) < 2**31, torch.tensor(words) - 2**32).to(torch.int32)


def rounded(bits: int):
    return lambda name, weight: Rtn(bits, 32).quantize(weight)


@pytest.mark.parametrize(
    ("packed", "bits"),
    [*((p, b) for p in ("auto_round", "auto_round:gptqmodel", "auto_round:auto_gptq") for b in (2, 3, 4, 8)), ("auto_round:auto_awq", 4)],
)
def test_every_packing_decodes_to_its_codes(tmp_path, packed, bits):
    run = finish("llama", tmp_path, rounded(bits))
    folder = auto_round(run, packed, bits=bits)
    source = QuantizedFolder(folder)
    assert source.names == frozenset(run.results) and source.reader.widths == {bits}
    for name, result in run.results.items():
        assert source.shape(name) == result.weight.shape
        assert torch.equal(source.weight(name).codes, result.weight.codes)
        assert torch.equal(source.weight(name).dequantize(), result.weight.dequantize()), name
    assert torch.allclose(streamed_logits(source.decoder()), logits(run.reference()), atol=1e-4)
    assert [finding.what for finding in check_base(folder) if not finding.ok] == []


@needs("gptqmodel")
def test_awqs_packing_is_gptqmodels():
    from gptqmodel.quantization.awq.utils.packing_utils import pack_awq

    codes = torch.randint(0, 16, (64, 24), generator=torch.Generator().manual_seed(0))
    theirs, _ = pack_awq(codes.T.contiguous().int(), codes.T.contiguous().int(), 4)
    assert torch.equal(awq(codes), theirs)


def test_layers_have_what_their_names_say_before_what_patterns_say(tmp_path):
    """And of the patterns the first that is found; 16 bits are a layer that was left alone."""

    def quantize(name, weight):
        if "v_proj" in name:
            return None
        return Rtn(8 if "layers.1.mlp.down" in name else 4 if "mlp" in name else 2, None if "o_proj" in name else 32).quantize(weight)

    run = finish("llama", tmp_path, quantize)
    extra = {
        ".*mlp.*": {"bits": 4},
        "(down|gate)_proj$": {"bits": 3, "group_size": 64},
        "o_proj$": {"group_size": -1},
        ".*v_proj.*": {"bits": 16, "data_type": "float"},
        "model.layers.1.mlp.down_proj": {"bits": 8},
    }
    folder = auto_round(run, "auto_round", extra)
    source = QuantizedFolder(folder)
    for name, result in run.results.items():
        assert torch.equal(source.weight(name).dequantize(), result.weight.dequantize()), name
    assert source.reader.widths == {2, 3, 4, 8}  # as said, whether or not a layer has it
    assert [finding.what for finding in check_base(folder) if not finding.ok] == []


def test_a_head_that_was_quantized_too_is_among_the_layers(tmp_path):
    run = finish("llama", tmp_path, rounded(2))
    reader = reader_of(CONFIG | {"bits": 2, "group_size": 32, "extra_config": {"lm_head": {"bits": 8}}})
    assert reader.layers(run.decoder.model) == {*run.results, "lm_head"}


@pytest.mark.parametrize("blocks", ["model.layers", ["model.layers"], [["model.layers.0", "model.layers.1"]], "model.layers,vision", None])
def test_blocks_are_named_in_several_ways(tmp_path, blocks):
    run = finish("llama", tmp_path, rounded(2))
    reader = reader_of(CONFIG | {"bits": 2, "group_size": 32, "block_name_to_quantize": blocks})
    assert reader.layers(run.decoder.model) == set(run.results)


PLAIN = {"quant_method": "auto-round", "bits": 4, "group_size": 32}
UNREADABLE = [
    ({"packing_format": "auto_round:nv_fp"}, "is packed as 'auto_round:nv_fp'; read are auto_round:auto_gptq"),
    ({"packing_format": "auto_round:auto_awq", "bits": 2}, "has 2 bits packed as auto_round:auto_awq; read are 4"),
    ({"bits": 5}, "has 5 bits packed"),
    ({"group_size": 0}, "has groups of 0"),
    ({"data_type": "mx_fp"}, "weights of the type 'mx_fp'"),
    ({"act_bits": 8}, "quantizes activations too (8 bits)"),
    ({"rotation_configs": [{"algorithm": "quarot"}]}, "was rotated before it was quantized"),
    ({"extra_config": {".*down.*": {"bits": 7}}}, "has 7 bits packed"),
    ({"extra_config": {"model.layers.0.mlp.up_proj": {"data_type": "fp"}}}, "layer 'model.layers.0.mlp.up_proj' has weights of the type"),
    ({"extra_config": {"(a+)+$": {"bits": 8}}}, "repeats more than names of layers need"),
    ({"extra_config": {"(down": {"bits": 8}}}, "is no regular expression"),
    ({"extra_config": [1]}, "is not one of auto-round"),
    ({"block_name_to_quantize": 3}, "is not one of auto-round"),
]


@pytest.mark.parametrize(("settings", "message"), UNREADABLE)
def test_what_is_no_integer_weight_is_refused(settings, message):
    with pytest.raises(ExportError, match=re.escape(message)):
        reader_of(PLAIN | settings)


def test_tensors_that_config_json_does_not_describe_are_refused(tmp_path):
    folder = auto_round(finish("llama", tmp_path, rounded(4)), "auto_round:auto_awq", bits=4)
    edit_json(folder / "config.json", lambda c: c["quantization_config"].update(group_size=16))
    with pytest.raises(ExportError, match=r"config\.json and the tensors disagree"):
        QuantizedFolder(folder).weight("model.layers.0.mlp.up_proj")


def test_training_on_it_is_refused_with_the_way_there(tmp_path):
    folder = auto_round(finish("llama", tmp_path, rounded(2)), "auto_round")
    with pytest.raises(ExportError, match="cloq export RUN --format gptq, then"):
        require_libraries(folder)

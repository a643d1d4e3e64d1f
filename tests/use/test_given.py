"""A base that someone else quantized is taken for the model it was made of, rounded, and for nothing else."""

from __future__ import annotations

import re

import pytest
import torch

from cloq.errors import ModelError
from cloq.models import Decoder
from cloq.quantizers import Rtn
from cloq.use.given import open_given
from tests.finished import edit_tensors, finish
from tests.tiny import save_tiny


def rtn(name, weight):
    return Rtn(2, 32).quantize(weight)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mixtral", "qwen2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_another_precision_is_the_same_model(family, dtype, tmp_path):
    run = finish(family, tmp_path, rtn)
    folder = run.export("gptq", dtype=dtype)
    assert open_given(folder, run.decoder).names == frozenset(run.results)


@pytest.mark.parametrize("scale", [0.9, 1.5])
def test_weights_that_were_scaled_into_the_norms_are_refused(scale, tmp_path):
    """As AWQ does: the norm is divided by what the layers behind it were multiplied by."""
    run = finish("llama", tmp_path, rtn)
    folder = run.export("gptq")

    def scaled(tensors):
        for index in range(2):
            tensors[f"model.layers.{index}.input_layernorm.weight"][3] *= scale

    edit_tensors(folder / "model.safetensors", scaled)
    message = f"input_layernorm.weight and 1 more differ, by {abs(scale - 1):.0%}. Its weights were scaled"
    with pytest.raises(ModelError, match=re.escape(message)):
        open_given(folder, run.decoder)


def test_norms_of_a_rotated_model_are_refused(tmp_path):
    """Rotations fold the norms' scales into the weights and leave ones."""
    run = finish("llama", tmp_path, rtn)
    edit_tensors(run.decoder.folder / "model.safetensors", lambda t: t["model.norm.weight"].mul_(torch.linspace(0.5, 2, 64)))
    folder = run.export("gptq")
    edit_tensors(folder / "model.safetensors", lambda t: t["model.norm.weight"].fill_(1))
    with pytest.raises(ModelError, match=r"model\.norm\.weight differ"):
        open_given(folder, Decoder(run.decoder.folder))


def test_another_models_base_is_refused(tmp_path):
    folder = finish("llama", tmp_path / "a", rtn).export("gptq")
    other = Decoder(save_tiny("llama", tmp_path / "b", num_hidden_layers=2, intermediate_size=128))
    with pytest.raises(ModelError, match=r"is \(64, 128\) in .* and \(64, 96\) in .*: another model's base"):
        open_given(folder, other)

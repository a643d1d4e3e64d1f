"""Folders as the real libraries write and read them: our reader decodes to the same weights, bit by bit, and ours load where theirs do."""

from __future__ import annotations

import pytest
import torch

from cloq.errors import ExportError
from cloq.export import compressed_tensors, nf4
from cloq.export.compressed_tensors import Scheme
from cloq.export.read import QuantizedFolder
from cloq.models import set_weight
from cloq.quantizers import Nf4, Rtn
from tests.finished import edit_json, edit_tensors, finish, logits, needs, streamed_logits
from tests.tiny import load_plain, save_tiny

gptqmodel = needs("gptqmodel", "optimum")
bitsandbytes = needs("bitsandbytes")
compressed = needs("compressed_tensors")


# -- GPTQ --------------------------------------------------------------------------------------------------------------


def to_version_1(folder, bits: int, symmetric: bool) -> None:
    """As GPTQModel saves its own v1: 1 taken from every zero point, from whole words but at 3 bits."""
    from gptqmodel.utils.model_dequant import _revert_gptq_v1_qzeros_correction

    ones = sum(1 << shift for shift in range(0, 32, bits))

    def change(tensors):
        for name in [n for n in tensors if n.endswith("qzeros")]:
            if bits == 3:
                tensors[name] = _revert_gptq_v1_qzeros_correction(tensors[name], bits)
            else:
                tensors[name] = tensors[name] - torch.tensor(ones - 2**32 if ones >= 2**31 else ones, dtype=torch.int32)

    edit_tensors(folder / "model.safetensors", change)
    edit_json(folder / "config.json", lambda c: c["quantization_config"].update(checkpoint_format="gptq", format="gptq", sym=symmetric))


@gptqmodel
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_version_1(tmp_path, bits, symmetric):
    """Zero points of 0 included: they make a word borrow, and the library gives it back the same way."""
    quantizer = Rtn(bits, 32, symmetric=symmetric)
    run = finish("llama", tmp_path, lambda name, weight: quantizer.quantize(weight.abs() if "up" in name else weight))
    folder = run.export("gptq")
    to_version_1(folder, bits, symmetric)
    source = QuantizedFolder(folder)
    assert source.reader.version == 1
    for name, result in run.results.items():
        assert torch.equal(source.weight(name).dequantize(), result.weight.dequantize()), name
    assert torch.allclose(logits(load_plain(folder)), logits(run.reference(precision=torch.float16)), atol=1e-4)


@gptqmodel
def test_four_bits_train_after_an_evaluation(tmp_path):
    """GPTQModel's own choice for 4 bits on a CPU, once used for inference, passes no gradient on; the kernel that is written does."""
    import peft

    run = finish("llama", tmp_path, lambda name, weight: Rtn(4, 32, symmetric=True).quantize(weight))
    base = run.export("gptq")
    model = peft.PeftModel.from_pretrained(load_plain(base), run.adapter(base), is_trainable=True)
    before = logits(model)
    model.train()
    tokens = torch.randint(1, 250, (2, 12))
    model(input_ids=tokens, labels=tokens).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(gradients) == 2 * 2 * 7 and all(g is not None and bool(g.any()) for g in gradients)
    assert torch.equal(logits(model.eval()), before)


@gptqmodel
def test_biases_and_other_families_load(tmp_path):
    """Biases are rounded to float16 by the library, whatever the precision of the rest."""
    for family in ("phi3", "opt", "gpt_neox", "gemma3", "mixtral"):
        run = finish(family, tmp_path / family, lambda name, weight: None if "experts" in name else Rtn(2, 32).quantize(weight))
        model = load_plain(run.export("gptq"))
        expected = logits(run.reference(precision=torch.float16))
        assert torch.allclose(logits(model), expected, atol=1e-3 * float(expected.abs().max())), family


@gptqmodel
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"bits": 4, "sym": True}, {"bits": 2, "sym": False, "format": "gptq_v2"}, {"bits": 4, "desc_act": True, "act_group_aware": False}],
    ids=str,
)
def test_a_folder_that_gptqmodel_quantized(tmp_path, monkeypatch, settings):
    """Its own v1, v2 and activation order, against its own kernel, which multiplies in float16."""
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # it fails on two cores or fewer without
    monkeypatch.chdir(tmp_path)  # it writes its logs where it stands
    from gptqmodel import GPTQModel, QuantizeConfig

    dense = save_tiny("llama", tmp_path / "dense", num_hidden_layers=2, dtype=torch.float16)
    rows = torch.randint(1, 250, (16, 1, 64), generator=torch.Generator().manual_seed(0))
    model = GPTQModel.load(str(dense), QuantizeConfig(group_size=32, **settings))
    model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows])
    model.save(str(tmp_path / "quantized"))
    source, theirs = QuantizedFolder(tmp_path / "quantized"), load_plain(tmp_path / "quantized")
    assert len(source.names) == 14 and source.reader.version == (2 if settings.get("format") == "gptq_v2" else 1)
    for name in source.names:
        assert torch.equal(theirs.get_submodule(name).dequantize_weight().T.float(), source.weight(name).dequantize().half().float()), name


# -- bitsandbytes ------------------------------------------------------------------------------------------------------


@bitsandbytes
@pytest.mark.parametrize("shape", [(96, 64), (40, 72), (3, 34)])
@pytest.mark.parametrize("double", [False, True])
def test_what_bitsandbytes_packs(shape, double):
    """Its own state dict decodes to its own weights, and ours is the same bytes where it does not quantize twice."""
    from bitsandbytes import functional

    weight = torch.randn(shape)
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    tensors = {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    found = nf4.decode(tensors)
    assert torch.equal(found.dequantize(), functional.dequantize_4bit(packed, state))
    if not double:
        ours = nf4.encode(Nf4().quantize(weight), "float32")
        assert ours.keys() == tensors.keys()
        for suffix in ("weight", "weight.absmax", "weight.quant_map"):
            assert torch.equal(ours[suffix], tensors[suffix].reshape(ours[suffix].shape)), suffix
        assert nf4._state(ours[nf4._STATE]) == nf4._state(tensors[nf4._STATE])


@bitsandbytes
@pytest.mark.parametrize("double", [False, True])
def test_a_folder_that_transformers_quantized_with_bitsandbytes(tmp_path, double):
    from bitsandbytes import functional
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    dense = save_tiny("llama", tmp_path / "dense", num_hidden_layers=2, intermediate_size=128, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=settings, dtype=torch.float32)
    model.save_pretrained(tmp_path / "quantized")
    source = QuantizedFolder(tmp_path / "quantized")
    assert len(source.names) == 14 and source.names == source.reader.layers(load_plain(dense))
    for name in source.names:
        weight = model.get_submodule(name).weight
        assert torch.equal(source.weight(name).dequantize(), functional.dequantize_4bit(weight.data, weight.quant_state).float()), name
    assert torch.allclose(streamed_logits(source.decoder()), logits(model.train()), atol=1e-4)


@bitsandbytes
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nf4_is_exact_while_training(tmp_path, family):
    """In evaluation a CPU with AVX512-BF16 computes in bfloat16. GPT-2's layers are turned, and some are square."""
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    run = finish(
        family, tmp_path, lambda name, weight: Nf4().quantize(weight), **(no_dropout if family == "gpt2" else {"intermediate_size": 128})
    )
    model = load_plain(run.export("nf4")).train()
    assert torch.allclose(logits(model), logits(run.reference()), atol=1e-4)


# -- compressed-tensors ------------------------------------------------------------------------------------------------


def library_scheme(scheme: Scheme):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = {"strategy": "group", "group_size": scheme.group_size} if scheme.group_size else {"strategy": "channel"}
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=scheme.bits, symmetric=scheme.symmetric, **strategy))


@compressed
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_compressed_tensors_packs(bits, group_size, symmetric):
    """Ours through its decompressor, and its own compression through ours. It multiplies in the scale's precision."""
    from compressed_tensors.compressors import BaseCompressor

    scheme = Scheme(bits, group_size, symmetric)
    library = BaseCompressor.get_value_from_registry("pack-quantized")
    weight = Rtn(bits, group_size, symmetric=symmetric).quantize(torch.randn(40, 96))
    theirs = library.decompress(compressed_tensors.encode(weight), library_scheme(scheme))["weight"]
    assert torch.equal(theirs.float(), weight.dequantize().half().float())

    middle = 2 ** (bits - 1)
    state = {"weight": weight.dequantize(), "weight_scale": weight.scale}
    state["weight_zero_point"] = (weight.zero.short() - middle).to(torch.int8)
    packed = library.compress(state, library_scheme(scheme))
    found = compressed_tensors.decode({key: value for key, value in packed.items() if key != "weight"}, scheme)
    assert torch.equal(found.codes, weight.codes) and torch.equal(found.dequantize(), weight.dequantize())


@compressed
@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors_with_several_widths(tmp_path, symmetric):
    """One scheme per width. transformers reads them where they are symmetric; where not, the library alone does, and so do servers."""
    import cloq

    run = finish("llama", tmp_path, lambda name, weight: Rtn(2 if "mlp" in name else 3, 32, symmetric=symmetric).quantize(weight))
    base = run.export("compressed-tensors")
    run.adapter(base)
    source = QuantizedFolder(base)
    assert {source.reader.scheme(name).bits for name in source.names} == {2, 3}
    for name, result in run.results.items():
        assert torch.equal(source.weight(name).dequantize(), result.weight.dequantize())
    if symmetric:
        assert torch.allclose(logits(load_plain(base)), logits(run.reference()), atol=1e-4)
        model = cloq.load(run.store.out, trainable=True)
        assert torch.allclose(logits(model), logits(run.reference(adapter=True)), atol=1e-4)
    else:
        with pytest.raises(ExportError, match="servers read but transformers cannot; write another base with cloq export"):
            cloq.load(run.store.out)


@compressed
@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_compressed_tensors_of_a_subclassed_linear(tmp_path, family):
    """Falcon's layers are a subclass of Linear, which this library takes and the others do not."""
    run = finish(family, tmp_path, lambda name, weight: Rtn(3, 32).quantize(weight))
    expected = logits(run.reference(precision=torch.float16))
    assert torch.allclose(logits(load_plain(run.export("compressed-tensors"))), expected, atol=1e-4)


def test_models_that_a_library_would_not_load_are_refused(tmp_path):
    def rtn(name, weight):
        return Rtn(2, 32).quantize(weight)

    falcon = finish("falcon", tmp_path / "falcon", rtn)
    with pytest.raises(
        ExportError, match=r"takes transformer\.h\.0.* a FalconLinear, for dense.* use --format compressed-tensors or dense"
    ):
        falcon.export("gptq")
    gpt2 = finish("gpt2", tmp_path / "gpt2", rtn)
    with pytest.raises(ExportError, match=r"GPT2Attention through the weight of .*c_proj, and a packed layer has none; use --format dense"):
        gpt2.export("gptq")
    model = load_plain(gpt2.export("dense", dtype="float32"))
    expected = gpt2.reference()
    for name, result in gpt2.results.items():
        set_weight(expected.get_submodule(name), result.weight.dequantize())
    assert torch.equal(logits(model), logits(expected))

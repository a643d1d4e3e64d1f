"""Packed layers under training: the same numbers, without a decoded copy waiting for the backward pass."""

import pytest
import torch

import cloq
from cloq.use.frozen import decode_again
from tests.finished import needs
from tests.training.tiny_run import tiny_run

pytestmark = needs("gptqmodel", "optimum")
IDS = torch.arange(1, 9)[None]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gradients_are_the_same_and_no_weight_is_kept(tmp_path, bits):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = tiny_run(tmp_path, bits)
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(run.store.out / "model", dtype=torch.float32), run.store.out / "adapter", is_trainable=True
    )
    ours = cloq.load(run.store.out, trainable=True, dtype=torch.float32)
    shapes, gradients, losses = [], [], []
    for model in (plain.train(), ours.train()):
        kept = set()

        def note(tensor, kept=kept):
            kept.add(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        shapes.append(kept)
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    weights = {(64, 96), (96, 64), (64, 128), (128, 64), (64, 32)}  # (in, out) of the packed layers
    assert len(shapes[0] & weights) >= 4 and not shapes[1] & weights
    assert losses[0] == losses[1] and len(gradients[0]) == 28
    for name, expected in gradients[0].items():
        assert torch.allclose(gradients[1][name], expected, rtol=1e-5, atol=1e-7), name


def test_dense_models_are_left_alone(tmp_path):
    run = tiny_run(tmp_path, form="dense")
    assert decode_again(cloq.load(run.store.out)) == 0

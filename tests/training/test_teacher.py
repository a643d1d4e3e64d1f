"""Following another model's predictions."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import cloq
from cloq.errors import ModelError, RunError, SpecError, TrainingError
from cloq.models import load_tokenizer
from cloq.training import TrainSpec, train_spec
from cloq.training.batches import IGNORED
from cloq.training.teacher import find_teacher, taught_loss
from tests.finished import needs
from tests.tiny import save_tiny
from tests.training.test_run import distance, factors
from tests.training.tiny_run import sums

gptq = needs("gptqmodel", "optimum")
QUICK = {"steps": 4, "batch_size": 4, "seq_len": 64, "device": "cpu", "lr": 1e-3}


def by_hand(student, teacher, labels, share, tokens=None):
    """Token by token, in float64."""
    total, count = 0.0, 0
    for row in range(labels.shape[0]):
        for at in range(1, labels.shape[1]):
            if labels[row, at] != IGNORED:
                p, q = teacher[row, at - 1].double().softmax(-1), student[row, at - 1].double().softmax(-1)
                total += share * float((p * (p / q).log()).sum()) - (1 - share) * float(q[labels[row, at]].log())
                count += 1
    return total / (tokens or count)


@pytest.mark.parametrize("share", (1.0, 0.3))
@pytest.mark.parametrize("tokens", (None, 40))
def test_the_loss_is_the_divergence_and_the_rest_of_it_the_text(share, tokens):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 7, 11, generator=generator) for _ in range(2))
    labels = torch.randint(0, 11, (2, 7), generator=generator)
    labels[0, 3] = labels[1, :4] = IGNORED
    found = taught_loss(student, teacher, labels, share, tokens)
    assert float(found) == pytest.approx(by_hand(student, teacher, labels, share, tokens), rel=1e-5)


def test_a_student_that_predicts_the_same_has_nothing_to_learn():
    student = torch.randn(1, 5, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = taught_loss(student, student + 2.0, torch.ones(1, 5, dtype=torch.int64), 1.0)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and float(student.grad.abs().max()) < 1e-6


def divergence(out, adapter, original) -> float:
    """From the original's predictions, on text of the kind that was trained on."""
    text = "\n".join(f"{row['question']} {row['answer']}" for row in reversed(sums(40)))
    ids = torch.tensor(load_tokenizer(out / "model")(text)["input_ids"][:120])[None]
    models = (cloq.load(out, adapter=adapter, dtype=torch.float32).eval(), AutoModelForCausalLM.from_pretrained(original))
    with torch.no_grad():
        student, teacher = (model(input_ids=ids).logits for model in models)
    return float(taught_loss(student, teacher, ids, 1.0))


@gptq
def test_the_model_comes_closer_to_its_teacher(out, rows, tmp_path):
    original = out.parent / "original"
    trained = cloq.train(out, data=str(rows), to=tmp_path / "to", teacher=str(original), **QUICK | {"steps": 60, "lr": 5e-3})
    assert trained.report["teacher"] == str(original.resolve()) and trained.losses[-1] < 0.5 * trained.losses[0]
    assert divergence(out, trained.adapter, original) < 0.9 * divergence(out, out / "adapter", original)


@gptq
def test_accumulation_does_not_matter(out, rows, tmp_path):
    taught = QUICK | {"teacher": str(out.parent / "original"), "distill": 0.5}
    whole = cloq.train(out, data=str(rows), to=tmp_path / "whole", **taught)
    parts = cloq.train(out, data=str(rows), to=tmp_path / "parts", **taught | {"batch_size": 2, "accumulation": 2})
    moved = distance(factors(out / "adapter"), factors(whole.adapter))
    assert distance(factors(whole.adapter), factors(parts.adapter)) < 1e-2 * moved
    assert whole.losses == pytest.approx(parts.losses, rel=1e-4)


@gptq
def test_a_killed_training_goes_on_with_the_same_teacher_alone(out, rows, tmp_path):
    original = tmp_path / "original"
    shutil.copytree(out.parent / "original", original)
    taught = QUICK | {"teacher": str(original), "save_every": 2, "data": str(rows)}

    class Killed(BaseException):
        pass

    def kill(event, values):
        if event == "step" and values["step"] == 3:
            raise Killed

    whole = cloq.train(out, to=tmp_path / "whole", **taught)
    with pytest.raises(Killed):
        cloq.train(out, to=tmp_path / "killed", emit=kill, **taught)
    other = save_tiny("llama", tmp_path / "other", num_hidden_layers=3)
    with pytest.raises(RunError, match="teacher was"):
        cloq.train(out, to=tmp_path / "killed", **taught | {"teacher": str(other)})
    moved = original.rename(tmp_path / "elsewhere")
    again = cloq.train(out, to=tmp_path / "killed", **taught | {"teacher": str(moved)})
    assert distance(factors(whole.adapter), factors(again.adapter)) == 0


def test_the_original_is_the_model_of_the_run_file(out, tmp_path):
    from cloq.api import write_run_file
    from cloq.specs import RunSpec

    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(TrainingError, match="name it with --teacher"):
        find_teacher(TrainSpec(run=str(run), teacher="original"), out / "model")
    write_run_file(RunSpec(model=str(out.parent / "original")), run)
    assert find_teacher(TrainSpec(run=str(run), teacher="original"), out / "model").folder == (out.parent / "original").resolve()


def test_what_cannot_teach_is_refused(out, tmp_path):
    with pytest.raises(SpecError, match="name one with --teacher"):
        train_spec(distill=0.5)
    with pytest.raises(SpecError, match="distill is 0"):
        train_spec(teacher="original", distill=0.0)
    with pytest.raises(ModelError, match="is not a folder"):
        find_teacher(TrainSpec(teacher="./nowhere"), out / "model")
    other = save_tiny("llama", tmp_path / "other", vocab_size=320)
    with pytest.raises(TrainingError, match="vocabulary of 320"):
        find_teacher(TrainSpec(teacher=str(other)), out / "model")

"""The job: what it starts from, what it refuses, and what it leaves behind."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer

import cloq
from cloq.api import write_run_file
from cloq.errors import ExportError, TrainingError
from cloq.models import load_tokenizer
from cloq.report import Report, write_report
from cloq.specs import run_spec
from cloq.training import TrainSpec, resolve
from cloq.training.batches import IGNORED
from cloq.training.examples import read_examples
from cloq.training.start import refuse_frozen
from tests.finished import edit_json, edit_tensors, needs
from tests.training.tiny_run import sums, tiny_run, write_rows

gptq = needs("gptqmodel", "optimum")
QUICK = {"steps": 3, "batch_size": 4, "seq_len": 64, "device": "cpu", "lr": 1e-3}


def factors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def distance(one: dict, other: dict) -> float:
    return max(float((one[key] - other[key]).abs().max()) for key in one)


@gptq
def test_the_result_is_an_ordinary_adapter_that_has_learned(out, rows, tmp_path):
    trained = cloq.train(out, data=str(rows), to=tmp_path / "to", **QUICK | {"steps": 40, "lr": 5e-3})
    assert trained.losses[-1] < 0.5 * trained.losses[0] and len(trained.losses) == 40
    config = json.loads((trained.adapter / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] and config["init_lora_weights"] is True
    assert config["base_model_name_or_path"] == str((out / "model").resolve())
    base = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, trained.adapter).eval()
    ours = cloq.load(out, adapter=trained.adapter, dtype=torch.float32).eval()
    ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, ours(input_ids=ids).logits)
    assert {p.name for p in trained.adapter.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "train.yaml", "training.json", "checkpoints",
    }  # fmt: skip


@gptq
def test_it_starts_from_the_fitted_factors(out, rows, tmp_path):
    trained = cloq.train(out, data=str(rows), to=tmp_path / "to", **QUICK | {"steps": 1, "lr": 1e-12, "warmup": 0.0})
    assert distance(factors(out / "adapter"), factors(trained.adapter)) < 1e-10


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3]),
        ("cosine", [1 / 3, 2 / 3, 1, 1, 3 / 4, 1 / 4]),
    ],
)
def test_every_step_has_a_rate(dense, rows, tmp_path, schedule, rates):
    trained = cloq.train(dense, data=str(rows), to=tmp_path / "to", **QUICK | {"steps": 6, "warmup": 0.5, "schedule": schedule})
    assert [entry["learning_rate"] / QUICK["lr"] for entry in trained.report["steps"]] == pytest.approx(rates)


def test_a_single_step_trains(dense, rows, tmp_path):
    trained = cloq.train(dense, data=str(rows), to=tmp_path / "to", **QUICK | {"steps": 1})
    assert distance(factors(dense / "adapter"), factors(trained.adapter)) > 0.1 * QUICK["lr"]


@gptq
def test_the_settings_file_repeats_the_run(out, rows, tmp_path):
    from cloq.training.run import run

    first = cloq.train(out, data=str(rows), to=tmp_path / "first", recipe="gsm8k", **QUICK)
    assert first.spec.recipe == "gsm8k-2bit" and first.spec.accumulation == 2 and first.spec.lr == QUICK["lr"]
    again = run(resolve(None, tmp_path / "first/train.yaml", {}), tmp_path / "again")
    assert factors(first.adapter).keys() == factors(again.adapter).keys() and distance(factors(first.adapter), factors(again.adapter)) == 0


def recipe_for(out: Path, **settings) -> str:
    return resolve(out, None, {"data": "rows.jsonl", "recipe": "gsm8k"} | settings).recipe


def test_a_recipe_takes_the_width_of_a_base_elsewhere(tmp_path):
    """As after `cloq init`: the adapter alone names it."""
    out = tiny_run(tmp_path, 3).store.out
    shutil.move(out / "model", tmp_path / "elsewhere")
    edit_json(out / "adapter/adapter_config.json", lambda c: c.update(base_model_name_or_path=str(tmp_path / "elsewhere")))
    assert recipe_for(out) == "gsm8k-3bit"
    adapter = shutil.move(out / "adapter", tmp_path / "adapter")
    assert recipe_for(out, adapter=str(adapter)) == "gsm8k-3bit"
    with pytest.raises(TrainingError, match="has no adapter"):
        recipe_for(out)


def test_a_recipe_takes_the_width_that_a_dense_base_was_rounded_to(tmp_path):
    run = tiny_run(tmp_path, 2, "dense")
    out, spec = run.store.out, run_spec(model=str(run.decoder.folder), bits=3)  # the layers are at 2, as where rules say so
    write_run_file(spec, out)
    assert recipe_for(out) == "gsm8k-3bit"
    write_report(out, Report(spec, run.store.summaries(), 1.0, {}))
    assert recipe_for(out) == recipe_for(out, base=str(out / "model")) == "gsm8k-2bit"


@gptq
@pytest.mark.parametrize("same", [{"batch_size": 2, "accumulation": 2}, {"gradient_checkpointing": True}], ids=str)
def test_what_must_not_matter_does_not(out, rows, tmp_path, same):
    plain = cloq.train(out, data=str(rows), to=tmp_path / "plain", **QUICK)
    other = cloq.train(out, data=str(rows), to=tmp_path / "other", **QUICK | same)
    moved = distance(factors(out / "adapter"), factors(plain.adapter))
    assert distance(factors(plain.adapter), factors(other.adapter)) < 1e-2 * moved


@gptq
def test_gradient_checkpointing_runs_blocks_again(out, rows, tmp_path, monkeypatch):
    """Without gradients at the input of the first block nothing would be checkpointed, and nobody would notice."""
    from cloq.training.checkpoints import TrainingFolder
    from cloq.training.run import _loaded, training_arguments
    from cloq.training.start import find_start

    kept = {}
    for checkpointing in (False, True):
        spec = TrainSpec(run=str(out), data=str(rows), device="cpu", gradient_checkpointing=checkpointing)
        model = _loaded(spec, find_start(spec), training_arguments(spec, TrainingFolder(tmp_path))).train()
        ids, sizes = torch.arange(1, 65)[None], []

        def note(tensor, sizes=sizes):
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        kept[checkpointing] = sum(sizes)
        assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    assert kept[True] < 0.5 * kept[False]


@pytest.mark.parametrize(
    ("bits", "form"),
    [
        pytest.param(3, "gptq", marks=gptq), pytest.param(4, "gptq", marks=gptq), pytest.param(2, "container", marks=gptq), (2, "dense"),
        pytest.param(4, "compressed-tensors", marks=needs("compressed_tensors")),
    ],
)  # fmt: skip
def test_every_form_of_base_trains(tmp_path, bits, form):
    run = tiny_run(tmp_path, bits, form)
    data = write_rows(tmp_path / "rows.jsonl", sums())
    trained = cloq.train(run.store.out, data=str(data), **QUICK | {"steps": 12, "lr": 5e-3})
    assert trained.adapter == run.store.out / "trained" and trained.losses[-1] < 0.9 * trained.losses[0]


@needs("bitsandbytes")
def test_an_nf4_base_trains_with_float32_factors(tmp_path):
    from cloq.quantizers import Nf4
    from tests.finished import finish

    run = finish("llama", tmp_path, lambda name, weight: Nf4().quantize(weight), intermediate_size=128)
    run.adapter(run.export("nf4"))
    data = write_rows(tmp_path / "rows.jsonl", sums())
    trained = cloq.train(run.store.out, data=str(data), **QUICK | {"steps": 12, "lr": 5e-3})
    assert trained.losses[-1] < 0.9 * trained.losses[0]
    assert {t.dtype for t in factors(trained.adapter).values()} == {torch.float32}


@gptq
def test_a_trained_adapter_trains_on(out, rows, tmp_path):
    first = cloq.train(out, data=str(rows), to=tmp_path / "first", **QUICK)
    second = cloq.train(out, data=str(rows), to=tmp_path / "second", adapter=str(first.adapter), **QUICK)
    assert second.report["started_from"] == str(first.adapter)
    assert distance(factors(first.adapter), factors(second.adapter)) > 0


@gptq
def test_the_evaluation_loss_is_the_mean_over_all_predicted_tokens(out, rows, tmp_path):
    trained = cloq.train(out, data=str(rows), eval_data=str(rows), to=tmp_path / "to", **QUICK | {"batch_size": 5})
    model = cloq.load(out, dtype=torch.float32).eval()
    examples = read_examples(TrainSpec(data=str(rows), seq_len=64), str(rows), load_tokenizer(out / "model")).examples
    total = count = 0
    for example in examples:
        ids = torch.from_numpy(example.input_ids).long()[None]
        labels = torch.where(torch.from_numpy(example.completion_mask), ids, IGNORED)
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        total += nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum").item()
        count += int((labels[0, 1:] != IGNORED).sum())
    first = trained.report["evaluations"][0]
    assert first["step"] == 0 and first["tokens"] == count and math.isclose(first["loss"], total / count, rel_tol=1e-4)


@gptq
@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(out, rows, tmp_path):
    settings = QUICK | {"batch_size": 2, "eval_share": 0.2, "save_every": 2}
    flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29573", "-m", "cloq", "train"]
    argv = [*launch, str(out), "--data", str(rows), "--to", str(tmp_path / "two"), "--json", *flags]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    events = [json.loads(line) for line in said.splitlines()]
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3]  # once, by the first process
    one = cloq.train(out, data=str(rows), to=tmp_path / "one", **settings | {"accumulation": 2})
    moved = distance(factors(out / "adapter"), factors(one.adapter))
    assert distance(factors(tmp_path / "two"), factors(one.adapter)) < 1e-3 * moved
    report = json.loads((tmp_path / "two/training.json").read_text())
    assert report["processes"] == 2
    assert math.isclose(report["evaluations"][-1]["loss"], one.report["evaluations"][-1]["loss"], rel_tol=1e-4)


@pytest.mark.slow
def test_accelerate_launches_it_too(dense, rows, tmp_path):
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--main_process_port",
        "29574",
        "-m",
        "cloq",
        "train",
    ]
    flags = ["--steps", "2", "--batch-size", "4", "--seq-len", "64", "--device", "cpu", "--lr", "1e-3", "--json"]
    argv = [sys.executable, *launch, str(dense), "--data", str(rows), "--to", str(tmp_path / "two"), *flags]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert [event["step"] for event in map(json.loads, said.splitlines()) if event["event"] == "step"] == [1, 2]
    assert json.loads((tmp_path / "two/training.json").read_text())["processes"] == 2
    one = cloq.train(dense, data=str(rows), to=tmp_path / "one", **QUICK | {"steps": 2, "accumulation": 2})
    moved = distance(factors(dense / "adapter"), factors(one.adapter))
    assert distance(factors(tmp_path / "two"), factors(one.adapter)) < 1e-3 * moved


def test_bfloat16_computes_and_float32_trains(dense, rows, tmp_path):
    trained = cloq.train(dense, data=str(rows), to=tmp_path / "to", precision="bf16", **QUICK | {"steps": 12, "lr": 5e-3})
    assert trained.report["precision"] == "bf16" and trained.losses[-1] < 0.9 * trained.losses[0]
    assert {tensor.dtype for tensor in factors(trained.adapter).values()} == {torch.float32}


@needs("tensorboard")
def test_tensorboard_is_told_of_every_step(dense, rows, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained = cloq.train(dense, data=str(rows), to=tmp_path / "to", report_to="tensorboard", **QUICK)
    events = EventAccumulator(str(next((tmp_path / "to/checkpoints/runs").iterdir()))).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(trained.losses)


# -- refusals ----------------------------------------------------------------------------------------------------------


@gptq
def test_a_loss_that_is_no_number_ends_it_and_keeps_the_last_checkpoint(out, rows, tmp_path, monkeypatch):
    step, calls = Trainer.training_step, []

    def breaking(self, *args, **kwargs):
        calls.append(1)
        return step(self, *args, **kwargs) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(Trainer, "training_step", breaking)
    with pytest.raises(TrainingError, match=r"the loss of step 3 is not a finite number.*--lr"):
        cloq.train(out, data=str(rows), to=tmp_path / "to", **QUICK | {"steps": 6, "save_every": 2})
    assert [p.name for p in (tmp_path / "to/checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert len(cloq.train(out, data=str(rows), to=tmp_path / "to", **QUICK | {"steps": 6, "save_every": 2}).losses) == 6


def test_without_a_checkpoint_none_is_promised(dense, rows, tmp_path, monkeypatch):
    step, calls = Trainer.training_step, []
    monkeypatch.setattr(Trainer, "training_step", lambda *a, **k: step(*a, **k) * (float("nan") if calls else calls.append(1) or 1))
    with pytest.raises(TrainingError, match=r"the loss of step 2 is not a finite number.*no checkpoint yet.*lower --lr"):
        cloq.train(dense, data=str(rows), to=tmp_path / "to", **QUICK)


@pytest.mark.parametrize(("settings", "where"), [({}, "loss of step 1"), ({"eval_share": 0.2}, "evaluation loss before the first step")])
def test_a_broken_start_is_called_one(dense, rows, tmp_path, settings, where):
    adapter = shutil.copytree(dense / "adapter", tmp_path / "adapter")
    edit_tensors(adapter / "adapter_model.safetensors", lambda t: next(iter(t.values())).fill_(1e38))
    events = []
    with pytest.raises(
        TrainingError, match=rf"the {where} is not a finite number.*no learning rate helps.*factors that are too large.*cloq check"
    ):
        cloq.train(
            dense, data=str(rows), to=tmp_path / "to", adapter=str(adapter), emit=lambda event, _: events.append(event), **QUICK | settings
        )
    assert events == ["start"]


def test_a_weight_of_the_start_that_is_no_number_is_named(rows, tmp_path):
    out = tiny_run(tmp_path, form="dense").store.out
    edit_tensors(out / "model/model.safetensors", lambda t: t["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(TrainingError, match=r"the start is broken \(NaN or Inf in .*model.norm.weight\)"):
        cloq.train(out, data=str(rows), **QUICK)


@gptq
def test_a_gradient_that_is_no_number_never_reaches_the_weights(out, rows, tmp_path, monkeypatch):
    step = Trainer.training_step

    def breaking(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        next(p for p in model.parameters() if p.grad is not None).grad[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(Trainer, "training_step", breaking)
    with pytest.raises(TrainingError, match="the gradient of step 1"):
        cloq.train(out, data=str(rows), to=tmp_path / "to", **QUICK)


def test_what_would_train_is_exactly_the_factors():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.ModuleDict(
                {"lora_A": nn.ModuleDict({"default": nn.Linear(2, 2, bias=False)}), "other": nn.Linear(2, 2, bias=False)}
            )

    model = Model()
    with pytest.raises(TrainingError, match=r"layer.other.weight has a gradient and is no factor"):
        refuse_frozen(model)
    model.layer["other"].requires_grad_(False)
    refuse_frozen(model)
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match="loaded frozen"):
        refuse_frozen(model)


@gptq
def test_an_adapter_of_another_base_is_refused(out, rows, tmp_path):
    """Of the same shapes, which nothing but the files' own word tells apart; of other shapes; and with a layer missing."""
    other = tiny_run(tmp_path / "other", bits=4).store.out
    with pytest.raises(ExportError, match=r"says that it belongs to .*other"):
        cloq.train(out, data=str(rows), to=tmp_path / "to", adapter=str(other / "adapter"), **QUICK)
    wider = tiny_run(tmp_path / "wider", intermediate_size=128).store.out
    with pytest.raises(TrainingError, match="does not fit the base"):
        cloq.train(out, data=str(rows), to=tmp_path / "to", adapter=str(wider / "adapter"), **QUICK)
    edit_tensors(other / "adapter/adapter_model.safetensors", lambda t: t.pop(next(iter(t))))
    with pytest.raises(TrainingError, match=r"missing"):
        cloq.train(other, data=str(rows), **QUICK)
    assert not (tmp_path / "to").exists()


@gptq
def test_a_moved_run_still_belongs_to_itself(rows, tmp_path):
    run = tiny_run(tmp_path / "here").store.out
    moved = Path(shutil.move(run, tmp_path / "there"))
    assert cloq.train(moved, data=str(rows), **QUICK).losses
    edit_json(moved / "adapter/adapter_config.json", lambda c: c.update(base_model_name_or_path="nowhere"))
    with pytest.raises(ExportError, match="says that it belongs to nowhere"):
        cloq.train(moved, data=str(rows), to=tmp_path / "to", **QUICK)


@gptq
def test_rows_that_share_a_sequence_do_not_see_each_other(out, rows, tmp_path):
    """The same rows, packed and not, all in one step: the same gradient."""
    settings = QUICK | {"steps": 1, "batch_size": 24, "warmup": 0.0, "lr": 1e-4, "seq_len": 128}
    apart = cloq.train(out, data=str(rows), to=tmp_path / "apart", packing="none", **settings)
    packed = cloq.train(out, data=str(rows), to=tmp_path / "packed", packing="rows", **settings)
    assert packed.report["data"]["examples"] < apart.report["data"]["examples"]
    assert packed.report["data"]["predicted"] == apart.report["data"]["predicted"]
    assert math.isclose(apart.losses[0], packed.losses[0], rel_tol=1e-4)


def test_a_family_whose_rows_would_see_each_other_is_refused(tmp_path):
    run = tiny_run(tmp_path, form="dense", family="gpt2")
    data = write_rows(tmp_path / "rows.jsonl", sums())
    run_it = lambda packing: cloq.train(run.store.out, data=str(data), to=tmp_path / packing, packing=packing, **QUICK)  # noqa: E731
    assert run_it("none").losses
    mpt = tiny_run(tmp_path / "mpt", form="dense", family="mpt").store.out
    with pytest.raises(TrainingError, match="would see each other"):
        cloq.train(mpt, data=str(data), packing="rows", **QUICK)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharding_is_refused(out, rows, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(TrainingError, match="is not supported: it splits weights"):
        cloq.train(out, data=str(rows), **QUICK)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_paged_optimizers_are_refused_without_a_gpu(out, rows):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(TrainingError, match="there is no GPU here; use --optimizer adamw or adamw-8bit"):
        cloq.train(out, data=str(rows), optimizer="paged-adamw", **QUICK)


@gptq
@needs("bitsandbytes")
def test_the_8_bit_optimizer_trains(out, rows, tmp_path):
    trained = cloq.train(out, data=str(rows), to=tmp_path / "to", optimizer="adamw-8bit", **QUICK | {"steps": 12, "lr": 5e-3})
    assert trained.losses[-1] < 0.9 * trained.losses[0]

"""`cloq generate`: the text is what transformers generates, it comes as it is written, and bad input is one line."""

from __future__ import annotations

import dataclasses
import io
import shutil
import sys

import pytest
import torch
from peft import PeftModel

import cloq
from cloq.api import write_run_file
from cloq.cli import main, use
from cloq.errors import ModelError, SpecError
from cloq.models import load_tokenizer, set_weight
from cloq.quantizers import Rtn
from cloq.specs import RunSpec
from cloq.use import generating
from cloq.use.generating import Sampling, generate, prompt_ids, with_each
from tests.finished import Finished, finish
from tests.tiny import load_plain

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Finished:
    """On a dense base of 128 positions, with a chat template and a run file, as `cloq quantize` would leave it."""
    root = tmp_path_factory.mktemp("run")
    run = finish("llama", root, lambda name, weight: Rtn(4, 32).quantize(weight), eos_token_id=None)
    tokenizer = load_tokenizer(run.decoder.folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(run.decoder.folder)
    run.adapter(run.export("dense", dtype="float32"))
    write_run_file(RunSpec(model=str(run.decoder.folder)), run.store.out)
    return run


@pytest.fixture(scope="module")
def tokenizer(run):
    return load_tokenizer(run.store.out / "model")


@pytest.fixture(scope="module")
def model(run):
    return cloq.load(run.store.out)


def by_hand(model, tokenizer, prompt: str, tokens: int, **settings) -> str:
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**ids, max_new_tokens=tokens, pad_token_id=0, **({"do_sample": False} | settings))
    return tokenizer.decode(output[0, ids.input_ids.shape[1] :], skip_special_tokens=True)


def said(capsys, *argv) -> str:
    assert main(["generate", *map(str, argv)]) == 0
    return capsys.readouterr().out


# -- the text ----------------------------------------------------------------------------------------------------------


def test_greedy_text_is_transformers_own_and_comes_in_pieces(model, tokenizer):
    pieces = []
    reply = generate(model, tokenizer, prompt_ids(tokenizer, "Once upon", 128), Sampling(20), pieces.append, 128)
    assert reply.text == "".join(pieces) == by_hand(model, tokenizer, "Once upon", 20) and not reply.full
    assert len([piece for piece in pieces if piece]) > 1


def test_draws_repeat_with_their_seed_and_leave_the_random_state_alone(model, tokenizer):
    ids, before = prompt_ids(tokenizer, "Once upon", 128), torch.get_rng_state()

    def text(**settings):
        return generate(model, tokenizer, ids, Sampling(16, **settings), lambda piece: None).text

    assert text(temperature=1.0, seed=3) == text(temperature=1.0, seed=3) != text(temperature=1.0, seed=4)
    assert text(temperature=1.0, top_p=1e-6) == text(), "the smallest share holds the likeliest token alone"
    assert torch.equal(torch.get_rng_state(), before)


def test_the_context_ends_the_text(model, tokenizer):
    ids = prompt_ids(tokenizer, "x" * 120, 128)
    reply = generate(model, tokenizer, ids, Sampling(50), lambda piece: None, 128)
    assert reply.full and reply.text == by_hand(model, tokenizer, "x" * 120, 8)
    assert not generate(model, tokenizer, ids, Sampling(8), lambda piece: None, 128).full


def test_a_conversation_goes_through_the_template(tokenizer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "Hm"}]
    assert tokenizer.decode(prompt_ids(tokenizer, messages, 128)["input_ids"][0]) == "u:Hi\na:Ho\nu:Hm\na:"


def test_each_model_is_the_one_that_its_name_says(run):
    """The same next-token logits as the original, the decoded weights, and those with the factors."""
    tokens = torch.arange(1, 9)[None]
    base = load_plain(run.decoder.folder)
    for name, result in run.results.items():
        set_weight(base.get_submodule(name), result.weight.dequantize())
    expected = {
        "16-bit": load_plain(run.decoder.folder),
        "base": base,
        "base + adapter": PeftModel.from_pretrained(load_plain(run.store.out / "model"), run.store.out / "adapter"),
    }

    def compared(name, model):
        with torch.no_grad():
            return name, torch.allclose(model(input_ids=tokens).logits, expected[name](input_ids=tokens).logits, atol=1e-4)

    assert with_each(run.store.out, run.decoder.folder, compared) == [(name, True) for name in expected]


def test_the_dense_model_is_freed_before_the_base_is_loaded(run, monkeypatch):
    import gc
    import weakref

    seen, load = [], generating.load

    def watched(*args, **kwargs):
        gc.collect()
        assert seen[0]() is None
        return load(*args, **kwargs)

    monkeypatch.setattr(generating, "load", watched)
    assert len(with_each(run.store.out, run.decoder.folder, lambda name, model: seen.append(weakref.ref(model)))) == 3


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0; allowed: 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; it is a share"),
        ({"top_p": 0.5}, "at temperature 0 nothing is drawn"),
        ({"seed": -1}, "seed is -1; allowed: 0 to 4294967295"),
        ({"temperature": 1.0, "seed": 10**20}, "seed is 100000000000000000000; allowed: 0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(SpecError, match=message):
        Sampling(**settings)


def test_prompts_that_cannot_be_answered(tokenizer):
    with pytest.raises(SpecError, match="the prompt is empty"):
        prompt_ids(tokenizer, " \n", 128)
    with pytest.raises(SpecError, match="the prompt has 128 tokens, but the model takes at most 128, its answer included"):
        prompt_ids(tokenizer, "x" * 128, 128)
    long = [{"role": role, "content": "x" * 60} for role in ("user", "assistant", "user")]
    with pytest.raises(SpecError, match="the conversation has 191 tokens"):
        prompt_ids(tokenizer, long, 128)


def test_chat_templates_that_are_missing_or_refuse(run, tokenizer):
    other = load_tokenizer(run.store.out / "model")
    other.chat_template = None
    with pytest.raises(SpecError, match=r"has no chat template .* leave out --chat"):
        prompt_ids(other, [{"role": "user", "content": "Hi"}], 128)
    other.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ModelError, match=r"template refuses the conversation \(roles must alternate\)"):
        prompt_ids(other, [{"role": "user", "content": "Hi"}], 128)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x" * 200], "the prompt has 200 tokens, but the model takes at most 128"),
        ([], "no prompt, and standard input is not a terminal"),
        (["--compare"], "--compare needs a prompt"),
        (["--prompt", "a", "--top-p", "0.5"], "at temperature 0 nothing is drawn"),
        (["--prompt", "a", "--device", "cuda:7"], "'cuda:7' is not available"),
        (["--prompt", "a", "--adapter", "none/such"], "none/such holds no readable adapter"),
        (["--prompt", "a", "--base", "none/such"], "none/such has no config.json"),
    ],
)
def test_bad_input_is_one_line_and_loads_no_model(run, capsys, monkeypatch, argv, message):
    monkeypatch.setattr("cloq.use.loading.load", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["generate", str(run.store.out), *argv]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and captured.out == ""


def test_chat_without_a_template_is_one_line(run, tmp_path, capsys):
    out = shutil.copytree(run.store.out, tmp_path / "out")
    (out / "model/chat_template.jinja").unlink()
    assert main(["generate", str(out), "--prompt", "Hi", "--chat"]) == 2
    assert "no chat template" in capsys.readouterr().err


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_text_alone(run, model, tokenizer, capsys, monkeypatch):
    expected = by_hand(model, tokenizer, "Once upon", 12) + "\n"
    assert said(capsys, run.store.out, "--prompt", "Once upon", "--max-new-tokens", 12) == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon"))
    assert said(capsys, run.store.out, "-p", "-", "--max-new-tokens", 12) == expected
    chat = by_hand(model, tokenizer, "u:Hi\na:", 12) + "\n"
    assert said(capsys, run.store.out, "--prompt", "Hi", "--chat", "--max-new-tokens", 12) == chat


def test_another_adapter(run, tmp_path, capsys, tokenizer):
    from tests.finished import edit_tensors

    trained = shutil.copytree(run.store.out / "adapter", tmp_path / "trained")
    edit_tensors(trained / "adapter_model.safetensors", lambda t: t.update({n: -2 * v for n, v in t.items() if "lora_B" in n}))
    expected = by_hand(cloq.load(run.store.out, adapter=trained), tokenizer, "Once upon", 12) + "\n"
    assert said(capsys, run.store.out, "--prompt", "Once upon", "--max-new-tokens", 12, "--adapter", trained) == expected


def test_an_adapter_of_another_base_is_refused_before_anything_is_loaded(run, tmp_path, capsys, monkeypatch):
    from tests.finished import edit_json

    other = finish("llama", tmp_path, lambda name, weight: Rtn(4, 32).quantize(weight), seed=7)
    adapter = other.adapter(other.export("dense", dtype="float32"))
    argv = ["generate", str(run.store.out), "-p", "a", "--max-new-tokens", "1", "--adapter", str(adapter)]
    assert main([*argv, "--base", str(run.store.out / "model")]) == 0
    monkeypatch.setattr("cloq.use.loading.load_base", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    monkeypatch.setattr("cloq.use.generating.load_dense", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    capsys.readouterr()
    for further in ([], ["--compare"]):
        assert main([*argv, *further]) == 2
        assert f"says that it belongs to {other.store.out / 'model'}, not to" in capsys.readouterr().err
    edit_json(adapter / "adapter_config.json", lambda config: config.update(r=8, lora_alpha=8))
    assert main([*argv, "--base", str(run.store.out / "model")]) == 2
    assert "do not belong together" in capsys.readouterr().err


def test_a_trained_adapter_that_nobody_asked_for_is_mentioned(run, tmp_path, capsys):
    out = shutil.copytree(run.store.out, tmp_path / "out")
    shutil.copytree(out / "adapter", out / "trained")
    for argv in (["generate", str(out), "-p", "a", "--max-new-tokens", "1"], ["merge", str(out), "--to", str(tmp_path / "merged")]):
        assert main(argv) == 0
        assert f"--adapter {out / 'trained'} takes the trained one" in capsys.readouterr().err
    assert main(["generate", str(out), "-p", "a", "--max-new-tokens", "1", "--adapter", str(out / "trained")]) == 0
    assert capsys.readouterr().err == ""


def test_compare_shows_three_texts(run, model, tokenizer, capsys):
    shown = said(capsys, run.store.out, "--prompt", "Once upon", "--max-new-tokens", 12, "--compare")
    with model.disable_adapter():
        base = by_hand(model, tokenizer, "Once upon", 12)
    texts = [by_hand(load_plain(run.decoder.folder), tokenizer, "Once upon", 12), base, by_hand(model, tokenizer, "Once upon", 12)]
    assert shown == "".join(f"[{name}]\n{text}\n" for name, text in zip(("16-bit", "base", "base + adapter"), texts, strict=True))


class Terminal(io.StringIO):
    """Standard input that a person types into; a line may be Ctrl-C."""

    def isatty(self) -> bool:
        return True


def type_in(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    answers = iter(lines)

    def typed(prompt: str) -> str:
        line = next(answers, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", typed)


def prompts_of(monkeypatch) -> list[str]:
    """What the model is given in each turn, as text."""
    seen, real = [], generating.generate

    def watched(model, tokenizer, ids, *rest):
        seen.append(tokenizer.decode(ids["input_ids"][0]))
        if "stop" in seen[-1]:
            raise KeyboardInterrupt
        reply = real(model, tokenizer, ids, *rest)
        return dataclasses.replace(reply, text=f"answer {len(seen)}")

    monkeypatch.setattr(generating, "generate", watched)
    return seen


def test_a_loop_of_prompts_without_memory(run, capsys, monkeypatch):
    type_in(monkeypatch, "one", "", "two")
    seen = prompts_of(monkeypatch)
    said(capsys, run.store.out, "--max-new-tokens", 2)
    assert seen == ["one", "two"]


def test_a_chat_remembers_what_was_answered(run, capsys, monkeypatch):
    """An interrupted answer and a prompt that does not fit are forgotten, with their questions; Ctrl-C at the prompt ends."""
    type_in(monkeypatch, "one", "stop", "x" * 200, "two", "^C", "never")
    seen = prompts_of(monkeypatch)
    assert main(["generate", str(run.store.out), "--chat", "--max-new-tokens", "2"]) == 0
    assert seen == ["u:one\na:", "u:one\na:answer 1\nu:stop\na:", "u:one\na:answer 1\nu:two\na:"]
    assert "the conversation has 222 tokens" in capsys.readouterr().err


def test_control_c_ends_cleanly(run, capsys, monkeypatch):
    prompts_of(monkeypatch)
    with pytest.raises(SystemExit) as end:
        main(["generate", str(run.store.out), "--prompt", "stop"])
    captured = capsys.readouterr()
    assert end.value.code == 130 and captured.err == "" and captured.out == "\n"


def test_the_end_of_input_ends_the_loop(monkeypatch, capsys):
    type_in(monkeypatch)
    assert use._line() is None and capsys.readouterr().out == "\n"


def test_a_full_context_is_said_beside_the_text(run, capsys):
    assert main(["generate", str(run.store.out), "--prompt", "x" * 120]) == 0
    assert "the model's context of 128 tokens is full" in capsys.readouterr().err

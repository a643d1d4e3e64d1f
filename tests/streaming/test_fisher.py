"""What outputs count, in a run: weighed as asked, found once, and the same however the run is interrupted."""

import pytest
import torch

from cloq.api import run
from cloq.errors import SpecError
from cloq.specs import run_spec
from cloq.streaming import fisher, pipeline
from cloq.streaming.store import GRADIENTS_FILE, Store
from tests.test_api import digest
from tests.tiny import tiny_spec


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return tiny_spec(tmp_path_factory.mktemp("fisher"), fisher=0.9)


@pytest.fixture(scope="module")
def whole(spec, tmp_path_factory):
    return run(spec, tmp_path_factory.mktemp("whole") / "out").out


def test_every_layer_is_solved_with_weights_of_mean_one(spec, tmp_path, monkeypatch):
    seen = []
    solve = pipeline.solve_layer
    monkeypatch.setattr(pipeline, "solve_layer", lambda weight, stats, *rest: seen.append(stats.outputs) or solve(weight, stats, *rest))
    run(spec, tmp_path / "out")
    assert len(seen) == 21 and all(float(outputs.mean()) == pytest.approx(1, rel=1e-4) for outputs in seen)
    assert all(float(outputs.min()) >= 0.1 - 1e-6 and float(outputs.std()) > 0.05 for outputs in seen)
    plain = []
    monkeypatch.setattr(pipeline, "solve_layer", lambda weight, stats, *rest: plain.append(stats.outputs) or solve(weight, stats, *rest))
    run(spec.replace(fisher=0.0), tmp_path / "plain")
    assert plain == [None] * 21


def test_gradients_are_found_once_and_a_continued_run_is_the_same(spec, whole, tmp_path, monkeypatch):
    calls = []
    find = fisher.squared_gradients
    monkeypatch.setattr(fisher, "squared_gradients", lambda *args, **kwargs: calls.append(1) or find(*args, **kwargs))

    class Killed(BaseException):
        pass

    def kill(event, values):
        if event == "block":
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            run(spec, tmp_path / "out", emit=kill)
        assert Store(tmp_path / "out").finished() == 1  # the second time it is read back
    run(spec, tmp_path / "out")
    assert len(calls) == 1 and digest(tmp_path / "out") == digest(whole)


def test_damaged_gradients_are_found_again(spec, whole, tmp_path):
    run(spec, tmp_path / "out")
    path = tmp_path / "out/.cloq" / GRADIENTS_FILE
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert Store(tmp_path / "out").kept_gradients() is None
    (tmp_path / "out/.cloq/blocks/00002.safetensors").unlink()
    run(spec, tmp_path / "out")
    assert Store(tmp_path / "out").kept_gradients() is not None and digest(tmp_path / "out") == digest(whole)


def test_layers_without_gradients_count_alike():
    found = fisher.output_weights({"none": torch.zeros(128), "some": torch.tensor([1.0, 3.0])}, 0.9)
    assert list(found) == ["some"]
    torch.testing.assert_close(found["some"], torch.tensor([0.1 + 0.45, 0.1 + 1.35]))


def test_it_is_cloqs_alone():
    assert not run_spec(init="eora").weighs_outputs
    assert not run_spec(init="eora", effort="fast").weighs_outputs
    with pytest.raises(SpecError, match="init 'eora' makes no use of"):
        run_spec(init="eora", fisher=0.5)
    with pytest.raises(SpecError, match="fisher is 1"):
        run_spec(fisher=1.0)

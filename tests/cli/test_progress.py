"""What a person is told, and what a script reads."""

import json

import pytest

from cloq.cli.progress import WARNINGS, progress

NOTE = "the stored block /out/[red]/00001.safetensors is damaged or missing (its checksum does not match): it is solved again"


@pytest.mark.parametrize("event", WARNINGS)
@pytest.mark.parametrize("mode", ["bar", "quiet"])
def test_a_warning_is_told_in_every_mode_as_it_is(mode, event, capsys):
    with progress(mode) as emit:
        emit(event, {"note": NOTE})
    captured = capsys.readouterr()
    assert f"note: {NOTE}" in captured.err and captured.out == ""


@pytest.mark.parametrize("event", WARNINGS)
def test_a_warning_is_an_event_for_a_script(event, capsys):
    with progress("json") as emit:
        emit(event, {"note": NOTE})
    assert json.loads(capsys.readouterr().out) == {"event": event, "note": NOTE}


def test_what_concerns_many_layers_is_told_once(capsys):
    with progress("bar") as emit:
        emit("start", {"blocks": 1, "finished": 0})
        for name, note in (("experts.0.up", "few tokens"), ("experts.1.up", "few tokens"), ("experts.1.down", "another thing")):
            emit("layer", {"name": name, "notes": (note,), "error_quantized": 0.2, "error_corrected": 0.1})
    told = capsys.readouterr().err
    assert told.count("few tokens") == 1 and told.count("another thing") == 1 and "experts.0.up: few tokens" in told

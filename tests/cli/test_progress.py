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

"""What a terminal is shown of messages that quote other people's files."""

import pytest

from cloq.cli import LONGEST, _left, told
from cloq.errors import ModelError


def test_control_characters_are_spelled_out():
    assert told(ModelError("no \x1b[2Jtensor\r\x00 of Müller’s\nuse another")) == "no \\x1b[2Jtensor\\r\\x00 of Müller’s\nuse another"


def test_a_long_message_keeps_its_ends():
    said = told(ModelError("begins here" + "x" * 10**6 + "; fetch it again"))
    assert len(said) < LONGEST + 10 and said.startswith("begins here") and said.endswith("; fetch it again")


@pytest.mark.parametrize(
    ("argv", "left"),
    [
        (["quantize", "model", "--out", "x"], "finished blocks are kept, the same command continues"),
        (["train", "x"], "checkpoints are kept, the same command continues"),
        (["merge", "x", "--to", "y"], "nothing is kept of it, the same command starts over"),
        (["check", "x"], ""),
        ([], ""),
    ],
)
def test_an_interrupted_command_says_what_is_left_of_it(argv, left):
    assert _left(argv).removeprefix("; ") == left

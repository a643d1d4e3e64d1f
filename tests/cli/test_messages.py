"""What a terminal is shown of messages that quote other people's files."""

from cloq.cli import LONGEST, told
from cloq.errors import ModelError


def test_control_characters_are_spelled_out():
    assert told(ModelError("no \x1b[2Jtensor\r\x00 of Müller’s\nuse another")) == "no \\x1b[2Jtensor\\r\\x00 of Müller’s\nuse another"


def test_a_long_message_keeps_its_ends():
    said = told(ModelError("begins here" + "x" * 10**6 + "; fetch it again"))
    assert len(said) < LONGEST + 10 and said.startswith("begins here") and said.endswith("; fetch it again")

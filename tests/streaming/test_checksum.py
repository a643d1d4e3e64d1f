"""The checksum inside the file: any change of any byte is seen, and sealing changes nothing else."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cloq.streaming.checksum import BLANK, DamageError, seal, verify


def sealed(path, **further):
    save_file({"a": torch.arange(40.0)}, path, {"block": json.dumps({"sha256": BLANK, **further})})
    seal(path)
    return path


def test_sealing_changes_only_the_digits(tmp_path):
    save_file({"a": torch.arange(40.0)}, tmp_path / "plain", {"block": json.dumps({"sha256": BLANK})})
    before, after = (tmp_path / "plain").read_bytes(), sealed(tmp_path / "sealed").read_bytes()
    differing = [at for at, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    assert 0 < len(differing) <= 64 and differing[-1] - differing[0] < 64
    assert torch.equal(load_file(tmp_path / "sealed")["a"], torch.arange(40.0))
    verify(tmp_path / "sealed")


def test_a_second_checksum_further_behind_is_content(tmp_path):
    path = sealed(tmp_path / "file", layers={"sha256": BLANK})
    verify(path)
    path.write_bytes(path.read_bytes().replace(BLANK.encode(), BLANK.encode()[:-1] + b"1"))
    with pytest.raises(DamageError, match="does not match"):
        verify(path)


def test_a_file_is_sealed_once(tmp_path):
    with pytest.raises(ValueError, match="sealed already"):
        seal(sealed(tmp_path / "file"))


def test_a_file_that_was_never_sealed_is_not_trusted(tmp_path):
    save_file({"a": torch.arange(40.0)}, tmp_path / "blank", {"block": json.dumps({"sha256": BLANK})})
    with pytest.raises(DamageError, match="does not match"):
        verify(tmp_path / "blank")
    save_file({"a": torch.arange(40.0)}, tmp_path / "none")
    with pytest.raises(DamageError, match="no checksum"):
        verify(tmp_path / "none")


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_change_is_seen(tmp_path_factory, data):
    path = sealed(tmp_path_factory.mktemp("damage") / "file")
    content = path.read_bytes()
    start = data.draw(st.integers(0, len(content) - 1))
    taken = data.draw(st.integers(0, 64))
    put = data.draw(st.binary(max_size=64))
    changed = content[:start] + put + content[start + taken :]
    path.write_bytes(changed)
    if changed == content:
        verify(path)
    else:
        with pytest.raises(DamageError):
            verify(path)

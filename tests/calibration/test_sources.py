"""Names: what there is, what is nearest to what was typed."""

import pytest

from cloq.calibration import NAMES, documents
from cloq.calibration.sources import check
from cloq.errors import CalibrationError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/stories.txt").write_text("Once.")
    return tmp_path


@pytest.mark.parametrize("source", [*NAMES, "org/name", "org/name:config", "org/name:config:test", "texts", "texts/stories.txt", "./texts"])
def test_what_there_is(source):
    check(source)


def test_a_name_wins_over_a_file_beside_it(here):
    (here / "demo").write_text("a file called demo")
    assert list(documents("./demo")) == ["a file called demo"]
    assert len(list(documents("demo"))) > 50


UNKNOWN = [
    ("wikitext", r"unknown calibration source 'wikitext' \(did you mean wikitext2\?\)\. Known: demo, self, c4, wikitext2, pile"),
    ("C4", r"did you mean c4\?"),
    ("text", r"did you mean texts\?"),
    ("zzzzzz", r"unknown calibration source 'zzzzzz'\. Known: .*owner/name\[:config\[:split\]\].*\.jsonl.*a:0\.5,b:0\.5"),
    (
        "texts/storys.txt",
        r"there is no file or folder texts/storys\.txt \(did you mean texts/stories\.txt\?\)\. Give a path that exists",
    ),
    ("./stories.jsonl.gz", r"there is no file or folder \./stories\.jsonl\.gz\. Give a path"),
    ("/nowhere/at/all.txt", r"there is no file or folder /nowhere/at/all\.txt, nor a folder /nowhere/at\. "),
    ("a/b/c", r"there is no file or folder a/b/c"),
    ("~nobody-of-that-name/a.txt", r"there is no file or folder ~nobody-of-that-name/a\.txt, nor a folder ~nobody-of-that-name\. "),
    (5000 * "x", r"unknown calibration source 'xxx"),
    ("org/name:a:b:c", r"there is no file or folder org/name:a:b:c"),
    (r"C:\a.txt", r"there is no file or folder C:"),
]


@pytest.mark.parametrize(("source", "message"), UNKNOWN)
def test_unknown_sources(source, message):
    with pytest.raises(CalibrationError, match=message):
        check(source)
    with pytest.raises(CalibrationError, match=message):
        documents(source)  # before the first document


def test_documents_takes_one_readable_source():
    with pytest.raises(CalibrationError, match=r"is a mixture; here one text is needed: name one of demo, texts"):
        documents("demo:0.5,texts:0.5")
    with pytest.raises(CalibrationError, match=r"'self' is text that the model samples .* cannot be read"):
        documents("self")
    assert list(documents("texts:1")) == ["Once."]

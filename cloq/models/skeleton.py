"""config.json → the model's modules without any weight, and the row of blocks in it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from cloq.errors import ModelError
from cloq.linears import is_linear
from cloq.models.experts import unfuse


def load_config(folder: str | Path, trust_remote_code: bool = False):
    """The folder's configuration; `ModelError` if it is missing, unreadable, or of a model that transformers does not know."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # configurations check themselves, and raise types of their own
        raise ModelError(
            f"{folder}/config.json does not describe a model that transformers knows ({reason(error, trust_remote_code)})"
        ) from error


def max_positions(config) -> int | None:
    """The longest sequence that a configuration allows, where it says."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)


def load_tokenizer(folder: str | Path, trust_remote_code: bool = False):
    """The folder's tokenizer; `ModelError` if there is none, or one that can't make tokens of a text."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer("a").input_ids  # noqa: B018 - some settings are looked at only now
        return tokenizer
    except Exception as error:  # tokenizer back ends raise types of their own
        raise ModelError(f"{folder} has no usable tokenizer ({reason(error, trust_remote_code)})") from error


def build_skeleton(config, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The causal language model that a configuration describes, in eval mode, with parameters on the meta device and buffers
    computed. Fused experts are taken apart where that can be done; see `cloq.models.experts`.

    Raises `ModelError` for a configuration that is not of a decoder-only language model.

    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{config.model_type} is an encoder-decoder; cloq takes decoder-only causal language models")
    try:
        bare = type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = AutoModelForCausalLM.from_config(bare, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # a configuration's and a model's constructors meet whatever its configuration says
        why = reason(error, trust_remote_code)
        raise ModelError(f"{config.model_type} is not a causal language model that transformers can build ({why})") from error
    return unfuse(model).eval()


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's row of blocks: of all module lists that are not inside another one, the one with the most weights in linear
    layers.

    Raises `ModelError` if there is none, or if blocks are used more than once.

    """

    def size(blocks: nn.ModuleList) -> int:
        return sum(m.weight.numel() for m in blocks.modules() if is_linear(m))

    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    outermost = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists if other != n)}
    best = max(outermost, key=lambda name: size(outermost[name]), default=None)
    if best is None or size(outermost[best]) == 0:
        raise ModelError(f"{type(model).__name__} has no row of blocks that hold linear layers; cloq takes decoder-only language models")
    blocks = outermost[best]
    owners: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for part in block.modules():
            if owners.setdefault(id(part), index) != index and any(True for _ in part.parameters()):
                raise ModelError(f"{type(model).__name__} uses the same layers in several blocks; shared blocks are not supported")
    return best, blocks


def reason(error: Exception, trust_remote_code: bool) -> str:
    """Why transformers did not give what was asked for, in a line."""
    text = str(error)
    if not trust_remote_code and "trust_remote_code" in text:
        return "it brings its own Python code; read that code, and if you trust it, pass --trust-remote-code"
    return " ".join(text.split())[:300] or type(error).__name__

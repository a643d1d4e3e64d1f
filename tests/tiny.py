"""Tiny random models of every tested family, saved as ordinary Hugging Face folders with safetensors and a tokenizer.

    folder = save_tiny("llama", tmp_path)                  # float32, one file
    folder = save_tiny("mixtral", tmp_path, dtype=torch.bfloat16, shards=3, num_hidden_layers=2)

Widths are chosen so that as few weights as possible are square (64 wide, 96 inside, heads of 32), all of them multiples of 32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from cloq.specs import RunSpec, run_spec

VOCABULARY = 288
"""Bytes, the end-of-text token, and a few that never occur."""

_WIDE = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 128}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32}
_LLAMA = _WIDE | _HEADS | {"intermediate_size": 96}
_SQUARE = {"num_attention_heads": 4}  # families whose heads always fill the width
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 24}
_SLIDING = {"sliding_window": 8}
_GEMMA4 = {
    "num_hidden_layers": 4,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # family: (model type, configuration)
    "llama": ("llama", _LLAMA),
    "llama-tied": ("llama", _LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", _LLAMA | _SLIDING),
    "ministral": ("ministral", _LLAMA | _SLIDING | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen2-sliding": ("qwen2", _LLAMA | _SLIDING | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", _LLAMA),
    "gemma": ("gemma", _LLAMA),
    "gemma2": ("gemma2", _LLAMA | _SLIDING | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", _LLAMA | _SLIDING | {"sliding_window_pattern": 2, "num_hidden_layers": 4}),
    "gemma4": ("gemma4_text", _LLAMA | _GEMMA4),
    "gemma4-shared": ("gemma4_text", _LLAMA | _GEMMA4 | {"num_kv_shared_layers": 2}),
    "phi": ("phi", _WIDE | _SQUARE | {"intermediate_size": 96}),
    "phi3": ("phi3", _LLAMA | {"pad_token_id": 0}),
    "smollm3": ("smollm3", _LLAMA | {"no_rope_layer_interval": 2, "num_hidden_layers": 4, "pad_token_id": 0}),
    "stablelm": ("stablelm", _WIDE | _SQUARE | {"num_key_value_heads": 2, "intermediate_size": 96, "use_qkv_bias": True}),
    "olmo2": ("olmo2", _LLAMA),
    "olmo3": ("olmo3", _LLAMA | _SLIDING),
    "cohere": ("cohere", _LLAMA | {"use_qk_norm": True}),
    "cohere2": ("cohere2", _LLAMA | _SLIDING | {"num_hidden_layers": 4}),
    "granite": ("granite", _LLAMA | {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "starcoder2": ("starcoder2", _LLAMA | _SLIDING),
    "glm4": ("glm4", _LLAMA | {"pad_token_id": 0}),
    "nemotron": ("nemotron", _LLAMA),
    "exaone4": ("exaone4", _LLAMA | _SLIDING | {"sliding_window_pattern": 3}),
    "seed_oss": ("seed_oss", _LLAMA),
    "gpt2": ("gpt2", _GPT2),
    "gpt2-scaled": ("gpt2", _GPT2 | {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False}),
    "gpt_bigcode": ("gpt_bigcode", _GPT2),
    "gptj": ("gptj", _GPT2 | {"rotary_dim": 8}),
    "codegen": ("codegen", _GPT2 | {"rotary_dim": 8}),
    "gpt_neo": (
        "gpt_neo",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 128,
        },
    ),
    "gpt_neox": ("gpt_neox", _WIDE | _SQUARE | {"intermediate_size": 96, "rotary_pct": 0.5, "use_parallel_residual": True}),
    "opt": ("opt", _WIDE | _SQUARE | {"ffn_dim": 96, "word_embed_proj_dim": 32}),
    "opt-post-norm": ("opt", _WIDE | _SQUARE | {"ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": False}),
    "bloom": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 3, "n_head": 4}),
    "mpt": ("mpt", {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 128}),
    "falcon": ("falcon", _WIDE | _SQUARE | {"multi_query": True, "parallel_attn": True, "bias": False}),
    "falcon-alibi": ("falcon", _WIDE | _SQUARE | {"alibi": True, "multi_query": False, "bias": True}),
    "biogpt": ("biogpt", _WIDE | _SQUARE | {"intermediate_size": 96}),
    "openai-gpt": ("openai-gpt", _GPT2),
    "minicpm3": ("minicpm3", _WIDE | _SQUARE | _LATENT | {"intermediate_size": 96}),
    "lfm2": ("lfm2", _LLAMA | {"layer_types": ["conv", "full_attention", "conv"]}),
    "mamba": ("mamba", _WIDE | {"state_size": 8}),
    "rwkv": ("rwkv", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "attention_hidden_size": 64}),
    "mixtral": ("mixtral", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", _LLAMA | _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("qwen3_moe", _LLAMA | _EXPERTS | {"num_experts": 4, "mlp_only_layers": [0]}),
    "olmoe": ("olmoe", _LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4, "head_dim": 16}),
    "granitemoe": ("granitemoe", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("phimoe", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("gpt_oss", _LLAMA | _SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 4}),
    "jetmoe": (
        "jetmoe",
        _WIDE | {"intermediate_size": 96, "num_key_value_heads": 2, "kv_channels": 32} | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "dbrx": (
        "dbrx",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        _WIDE
        | _SQUARE
        | _LATENT
        | _EXPERTS
        | {
            "num_key_value_heads": 4,
            "intermediate_size": 96,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "head_dim": 16,
        }
        | {"first_k_dense_replace": 1},
    ),
}

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "gpt_oss", "jetmoe", "dbrx", "deepseek_v3")
"""Families of the table with experts fused into one parameter."""


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """A float32 model with random weights, larger than the usual initialisation so that every part matters to the logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **(settings | {"bos_token_id": 0, "eos_token_id": 0} | overrides))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, tensor in model.named_parameters():
            if tensor.ndim > 1:
                nn.init.normal_(tensor, std=2.0 * tensor.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.normal_(tensor, std=0.2)
    return model.eval()


def save_tiny(family: str, folder: Path, *, dtype: torch.dtype = torch.float32, shards: int = 1, seed: int = 0, **overrides: Any) -> Path:
    """Saves `tiny_model(family, seed, **overrides)` into `folder`, in `dtype`, as one file or about `shards` files, with a
    tokenizer; returns the folder."""
    model = tiny_model(family, seed, **overrides).to(dtype)
    size = sum(p.nbytes for p in model.parameters())
    model.save_pretrained(folder, **({"max_shard_size": size // shards + 1} if shards > 1 else {}))
    save_tokenizer(folder)
    return folder


def tiny_spec(folder: Path, **settings: Any) -> RunSpec:
    """A run that takes seconds: a tiny Llama and its calibration text, both saved in the folder."""
    text = folder / "text.txt"
    text.write_text("A tokenizer of bytes makes much of few words. " * 60)
    calibration = {"calib": str(text), "calib_samples": 8, "seq_len": 32, "heldout": 0.5}
    quantization = {"bits": 2, "group_size": 32, "rank": 4, "device": "cpu"}
    return run_spec(model=str(save_tiny("llama", folder / "model")), **calibration | quantization | settings)


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: token 0 ends a text, token 1 + b is byte b."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {"<|end|>": 0} | {letter: i + 1 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>").save_pretrained(folder)


def load_plain(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The folder through plain transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

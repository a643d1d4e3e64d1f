"""The adapter as an ordinary PEFT folder: adapter_config.json and adapter_model.safetensors.

`lora_alpha / r` is the scale that is asked for, without rank stabilisation, and the factors are larger by its inverse root, so that what
PEFT computes is the product that was fitted, to the last bit. The file of the factors says in its metadata which scale that is.
`init_lora_weights` is true: any name there would make PEFT initialise again, and servers refuse it.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cloq.errors import ExportError
from cloq.export.folder import ANOTHER_TARGET, refuse_other_content, replaced_when_complete
from cloq.models import Decoder, set_weight
from cloq.streaming.store import Store, write_atomically, write_tensors, writing
from cloq.types import LoraFactors

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX, _A, _B, _BASE = "base_model.model.", ".lora_A.weight", ".lora_B.weight", ".base_layer.weight"
_SCALE = "scale"


def write_adapter(store: Store, base: str, modules: Iterable[str], target: Path, scale: float = 1.0) -> Path:
    """Writes the factors of a finished store, as float32.

    base: what `base_model_name_or_path` says. modules: full names of every module of the model that could be taken for a target,
    at least all linear layers; short target names (`q_proj`) are used where they pick the layers with factors and no other.
    scale: `lora_alpha / r` of every layer, a power of 4, which rounds nothing. The smaller, the less a step of training moves the outputs.
    """
    larger = scale**-0.5
    ranks = {name: summary.metrics.rank for name, summary in store.summaries().items()}
    tensors: dict[str, Tensor] = {}
    for index in range(store.finished()):
        for name, result in store.read(index).items():
            tensors[f"{_PREFIX}{name}{_A}"] = (larger * result.factors.A).contiguous()
            tensors[f"{_PREFIX}{name}{_B}"] = (larger * result.factors.B).contiguous()
    with writing(target.parent), replaced_when_complete(target) as folder:
        lora_config(ranks, base, modules, scale).save_pretrained(folder)
        _sort_sets(folder / CONFIG)
        write_tensors(folder / WEIGHTS, tensors, {"format": "pt", _SCALE: repr(scale)})
    return target


def write_one_rank(adapter: AdapterFolder, target: Path, own: bool = False) -> Path:
    """The same products with one rank for all layers, the largest there is, and a scale of 1: zeros make up the others' rows and columns.

    For what reads `r` and `lora_alpha` alone. It is for inference: the added rows and columns have no gradient. own: whether what `target`
    holds is an earlier one. Raises `ExportError` for an adapter that is more than products added to linear layers, and for other content.
    """
    refuse_other_content(target, own)
    adapter.refuse_more_than_lora()
    factors = {name: adapter.read(name) for name in sorted(adapter.names)}
    rank = max(len(found.A) for found in factors.values())
    tensors = adapter.beside_factors()
    for name, found in factors.items():
        missing = rank - len(found.A)
        tensors[f"{_PREFIX}{name}{_A}"] = nn.functional.pad(found.A, (0, 0, 0, missing))
        tensors[f"{_PREFIX}{name}{_B}"] = nn.functional.pad(found.B * adapter.scale(name), (0, missing))
    plain = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    config = {**adapter.config, **plain}
    with writing(target.parent, ANOTHER_TARGET), replaced_when_complete(target) as folder:
        write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
        write_tensors(folder / WEIGHTS, tensors, {"format": "pt", _SCALE: repr(1.0)})
    return target


def _sort_sets(path: Path) -> None:
    """PEFT keeps target names in a set, whose order changes from process to process; equal runs write equal bytes."""
    values = json.loads(path.read_text("utf8"))
    values = {key: sorted(value) if key == "target_modules" else value for key, value in sorted(values.items())}
    write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())


def lora_config(ranks: dict[str, int], base: str, modules: Iterable[str], scale: float = 1.0):
    """The `peft.LoraConfig` for factors of the given ranks; the commonest rank is `r`, others stand in `rank_pattern`."""
    from peft import LoraConfig

    counts = Counter(ranks.values())
    rank = max(counts, key=lambda r: (counts[r], r))
    other = {re.escape(name): r for name, r in ranks.items() if r != rank}  # PEFT reads the keys as patterns
    return LoraConfig(
        r=rank,
        lora_alpha=_alpha(rank, scale),
        target_modules=sorted(_targets(ranks, modules)),
        rank_pattern=other,
        alpha_pattern={name: _alpha(r, scale) for name, r in other.items()},
        lora_dropout=0.0,
        bias="none",
        use_rslora=False,
        use_dora=False,
        init_lora_weights=True,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )


def _alpha(rank: int, scale: float) -> float:
    """A whole number where it is one, which is all that some readers expect."""
    alpha = rank * scale
    return int(alpha) if alpha == int(alpha) else alpha


def _targets(ranks: dict[str, int], modules: Iterable[str]) -> set[str]:
    """Last parts of the names (`q_proj`) where they pick exactly the layers with factors, else full names."""
    short = {name.rsplit(".", 1)[-1] for name in ranks}
    picked = {name for name in modules if name.rsplit(".", 1)[-1] in short}
    return short if picked <= set(ranks) else set(ranks)


_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # the others take something out of the base when loaded
}
_EXTRAS = (
    "use_dora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip


class AdapterFolder:
    """The factors in a PEFT folder, read layer by layer. config: adapter_config.json. names: full names of the layers with
    factors.

    Raises `ExportError` if the folder holds no adapter, or a damaged one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.config = json.loads((self.folder / CONFIG).read_text("utf8"))
            self._file = safe_open(self.folder / WEIGHTS, framework="pt")
            self.keys = frozenset(self._file.keys())
        except (OSError, ValueError, SafetensorError) as error:
            raise ExportError(
                f"{self.folder} holds no readable adapter, which is {CONFIG} and {WEIGHTS} ({error}); is it the adapter of a finished run?"
            ) from error
        self.names = frozenset(key.removeprefix(_PREFIX).removesuffix(_A) for key in self.keys if key.endswith(_A))

    def read(self, name: str) -> LoraFactors:
        """The factors of one layer, float32. Raises `ExportError` if one of the two is missing."""
        return LoraFactors(*(self._tensor(f"{_PREFIX}{name}{suffix}").float() for suffix in (_A, _B)))

    def shapes(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a layer's A and B, from the file's header."""
        A, B = (tuple(self._file.get_slice(f"{_PREFIX}{name}{suffix}").get_shape()) for suffix in (_A, _B))
        return A, B

    def delta(self, name: str) -> Tensor:
        """What PEFT adds to a layer's weight, `(out, in)` float32: `B A` times alpha / r, or alpha / √r where it is rank-stabilised.
        Raises `ExportError` for an adapter that does anything else besides."""
        self.refuse_more_than_lora()
        return self.read(name).delta() * self.scale(name)

    def scale(self, name: str) -> float:
        """What PEFT multiplies a layer's `B A` by."""
        rank, alpha = self.rank_and_alpha(name)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @property
    def fitted_scale(self) -> float | None:
        """That with which the product is the one that was fitted, where the file says so: libraries that train it do not keep the word."""
        try:
            return float((self._file.metadata() or {})[_SCALE])
        except (KeyError, ValueError):
            return None

    @property
    def of_one_rank(self) -> bool:
        """Whether `r` and `lora_alpha` say all of every layer's rank and scale."""
        return not (self.config.get("rank_pattern") or self.config.get("alpha_pattern"))

    def added_to(self, decoder: Decoder) -> Callable[[int, dict[str, nn.Module]], None]:
        """For `cloq.use.evaluate.perplexity`: puts `W + delta` into every layer of a block that has factors."""

        def add(index: int, linears: dict[str, nn.Module]) -> None:
            for name, module in linears.items():
                if name in self.names:
                    set_weight(module, decoder.weight(name, module) + self.delta(name).to(decoder.device))

        return add

    def refuse_more_than_lora(self) -> None:
        """Raises `ExportError` if the adapter is more than products added to the weights of linear layers."""
        if self._more_than_lora:
            raise ExportError(
                f"the adapter in {self.folder} is more than a plain LoRA of linear layers ({self._more_than_lora[0]}), which B A alone "
                "does not give. PEFT itself can run it (cloq eval --packed) and merge it: cloq export --format dense, then "
                "merge_and_unload()"
            )

    @functools.cached_property
    def _more_than_lora(self) -> list[str]:
        known = self.expected_keys(self.names) | self.own_weights(self.names)
        odd = [key for key, plain in _PLAIN.items() if self.config.get(key, plain[0]) not in plain]
        odd += [key for key in _EXTRAS if self.config.get(key)]
        return sorted(self.keys - known) + [f"{key} is {self.config[key]!r}" for key in odd]

    def base_weight(self, name: str) -> Tensor | None:
        """The layer's own weight, which PEFT saves and loads with the factors of heads and embeddings; `None` where it did not."""
        key = f"{_PREFIX}{name}{_BASE}"
        return self._file.get_tensor(key) if key in self.keys else None

    def beside_factors(self) -> dict[str, Tensor]:
        """All other tensors: weights that PEFT saves with the factors of heads and embeddings."""
        return {key: self._file.get_tensor(key) for key in sorted(self.keys - self.expected_keys(self.names))}

    def _tensor(self, key: str) -> Tensor:
        if key not in self.keys:
            raise ExportError(f"{self.folder / WEIGHTS} lacks {key}; write the adapter again by running the same cloq quantize command")
        return self._file.get_tensor(key)

    def expected_keys(self, names: Iterable[str]) -> set[str]:
        """Names of all tensors of an adapter on these layers."""
        return {f"{_PREFIX}{name}{suffix}" for name in names for suffix in (_A, _B)}

    def targets(self, modules: Iterable[str]) -> set[str]:
        """Those of the modules that PEFT puts factors on, by its own rule. Raises `ExportError` for settings that it cannot read."""
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        try:
            config = LoraConfig.from_pretrained(str(self.folder))
            return {name for name in modules if config.target_modules and check_target_module_exists(config, name)}
        except (TypeError, ValueError, AttributeError, re.error) as error:
            raise ExportError(f"PEFT cannot read {self.folder / CONFIG} ({str(error).splitlines()[0]}); mend its settings") from error

    def own_weights(self, names: Iterable[str]) -> set[str]:
        """Names of the tensors with which an adapter replaces the weights of these layers."""
        return {f"{_PREFIX}{name}{_BASE}" for name in names}

    def rank_and_alpha(self, name: str) -> tuple[int, float]:
        """What PEFT uses for a layer: the first pattern that fits the end of its name, else `r` and `lora_alpha`."""

        def pick(patterns: dict | None, default):
            return next((v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", name)), default)

        config = self.config
        return pick(config.get("rank_pattern"), config.get("r")), pick(config.get("alpha_pattern"), config.get("lora_alpha"))

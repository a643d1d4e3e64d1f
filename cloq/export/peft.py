"""The adapter as an ordinary PEFT folder: adapter_config.json and adapter_model.safetensors.

`lora_alpha = r` and no rank-stabilised scaling, so that PEFT multiplies by 1 and the product is the one that was fitted.
`init_lora_weights` is true: any name there would make PEFT initialise again, and servers refuse it.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from cloq.errors import ExportError
from cloq.export.folder import replaced_when_complete
from cloq.store import Store, write_atomically, writing
from cloq.types import LoraFactors

WEIGHTS = "adapter_model.safetensors"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def write_adapter(store: Store, base: str, all_linears: list[str], target: Path) -> Path:
    """Writes the factors of a finished store.

    base: what `base_model_name_or_path` says. all_linears: full names of every linear layer in the model, so that short target
    names can be used where they are not ambiguous. The factors stay float32.
    """
    ranks = {name: summary.metrics.rank for name, summary in store.summaries().items()}
    tensors: dict[str, Tensor] = {}
    for index in range(store.finished()):
        for name, result in store.read(index).items():
            tensors[f"{_PREFIX}{name}{_A}"] = result.factors.A.contiguous()
            tensors[f"{_PREFIX}{name}{_B}"] = result.factors.B.contiguous()
    with writing(target.parent), replaced_when_complete(target) as folder:
        lora_config(ranks, base, all_linears).save_pretrained(folder)
        _sort_sets(folder / "adapter_config.json")
        write_atomically(folder / WEIGHTS, save(tensors, {"format": "pt"}))
    return target


def _sort_sets(path: Path) -> None:
    """PEFT keeps target names in a set, whose order changes from process to process; equal runs should write equal bytes."""
    values = json.loads(path.read_text("utf8"))
    values = {key: sorted(value) if key == "target_modules" else value for key, value in sorted(values.items())}
    write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())


def lora_config(ranks: dict[str, int], base: str, all_linears: list[str]):
    """The `peft.LoraConfig` for factors of the given ranks; the commonest rank is `r`, others stand in `rank_pattern`."""
    from peft import LoraConfig

    values = list(ranks.values())
    rank = max(set(values), key=values.count)
    other = {name: r for name, r in ranks.items() if r != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(_targets(ranks, all_linears)),
        rank_pattern=other,
        alpha_pattern=dict(other),
        lora_dropout=0.0,
        bias="none",
        use_rslora=False,
        use_dora=False,
        init_lora_weights=True,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )


def _targets(ranks: dict[str, int], all_linears: list[str]) -> set[str]:
    """Last parts of the names (`q_proj`) where they pick exactly the layers with factors, else full names."""
    short = {name.rsplit(".", 1)[-1] for name in ranks}
    picked = {name for name in all_linears if name.rsplit(".", 1)[-1] in short}
    return short if picked == set(ranks) else set(ranks)


class AdapterFolder:
    """The factors in a PEFT folder, read layer by layer. names: full names of the layers that have them.

    Raises `ExportError` if the folder holds no adapter.
    """

    def __init__(self, folder: Path):
        if not (folder / WEIGHTS).is_file():
            raise ExportError(f"{folder} has no {WEIGHTS}; is it the adapter of a finished run?")
        self._file = safe_open(folder / WEIGHTS, framework="pt")
        self.names = frozenset(key.removeprefix(_PREFIX).removesuffix(_A) for key in self._file.keys() if key.endswith(_A))

    def read(self, name: str) -> LoraFactors:
        """The factors of one layer, float32."""
        A, B = (self._file.get_tensor(f"{_PREFIX}{name}{suffix}").float() for suffix in (_A, _B))
        return LoraFactors(A, B)

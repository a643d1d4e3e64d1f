"""The values of a report and what is derived from them. report.json is this as JSON."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from cloq import __version__
from cloq.report import wording
from cloq.specs import RunSpec
from cloq.streaming.store import LayerSummary
from cloq.tasks.spec import TaskScore
from cloq.types import LayerMetrics, WeightLayout
from cloq.use.evaluate import Quality

STORED_ADAPTER_BITS = 32
"""cloq writes the factors in float32."""


class Place(NamedTuple):
    """Where a layer sits: the number of its block (`None` for a name without one) and its kind, such as `self_attn.q_proj`, with
    further numbers as `*` (`mlp.experts.*.up_proj`)."""

    block: int | None
    kind: str


def place(name: str) -> Place:
    """The block and kind that a full layer name says: its first number is the block, what follows is the kind."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    kind = ["*" if part.isdecimal() else part for part in parts[0 if at is None else at + 1 :]]
    return Place(None if at is None else int(parts[at]), ".".join(kind) or name)


@dataclass(frozen=True)
class Report:
    """One finished run.

    layers: layout and metrics by full name. seconds: of the whole run; phases: the parts of it that were timed.
    form: format of the base in `model/`, `None` where the base was given.
    sizes: bytes of weights on disk, by `original`, `base` and `adapter`. peak_memory: bytes, by `host` and `device`.
    quality: perplexities, of one or more texts. tasks: scores on tasks. notes: what concerns the whole run; what concerns one layer is in
    its metrics.
    """

    spec: RunSpec
    layers: dict[str, LayerSummary]
    seconds: float
    phases: dict[str, float]
    form: str | None = "gptq"
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    peak_memory: dict[str, int] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    quality: tuple[Quality, ...] = ()
    tasks: tuple[TaskScore, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.layers:
            raise ValueError("a report needs at least one layer")

    def replace(self, **changes: Any) -> Report:
        return dataclasses.replace(self, **changes)

    # -- JSON ----------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` gives an equal report. NaN and Inf become null. `summary` is derived and not read back."""
        layers = {n: {"layout": dataclasses.asdict(s.layout), "metrics": dataclasses.asdict(s.metrics)} for n, s in self.layers.items()}
        values = {
            "cloq": __version__,
            "summary": self.summary(),
            "settings": self.spec.to_dict(),
            "quality": [dataclasses.asdict(q) for q in self.quality],
            "tasks": [dataclasses.asdict(t) for t in self.tasks],
            "seconds": self.seconds,
            "phases": self.phases,
            "form": self.form,
            "sizes": self.sizes,
            "peak_memory": self.peak_memory,
            "versions": self.versions,
            "notes": self.notes,
            "layers": layers,
        }
        return _json(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """Raises `KeyError`, `TypeError` or `ValueError` for what `to_dict` did not make."""
        plain = {key: values[key] for key in ("seconds", "phases", "form", "sizes", "peak_memory", "versions")}
        return cls(
            RunSpec.from_dict(values["settings"]),
            {name: _layer(described) for name, described in values["layers"].items()},
            quality=tuple(Quality(**{k: math.nan if v is None else v for k, v in q.items()}) for q in values["quality"]),
            tasks=tuple(_task_score(described) for described in values.get("tasks", ())),  # reports of before have none
            notes=tuple(values["notes"]),
            **plain,
        )

    def summary(self) -> dict[str, Any]:
        """The headline numbers."""
        return {
            "layers": len(self.layers),
            "blocks": len(self.blocks()),
            "quantized_parameters": self.parameters(),
            "adapter_parameters": self.adapter_parameters(),
            "bits_per_weight": self.bits_per_weight(),
            "bits_per_weight_with_adapter": self.bits_per_weight(STORED_ADAPTER_BITS),
            "bits_per_weight_with_16_bit_adapter": self.bits_per_weight(16),
            **{key: self.mean(key) for key in ("error_quantized", "error_corrected", "heldout_quantized", "heldout_corrected")},
            "repaired": self.repaired(),
            "repaired_heldout": self.repaired(heldout=True),
        }

    # -- in words ------------------------------------------------------------------------------------------------------

    def model_name(self) -> str:
        """The hub id, or the name of the folder without the path to it."""
        return self.spec.model if is_hub_id(self.spec.model) else Path(self.spec.model).name

    def bits(self) -> float:
        """The mean width that was asked for, or what most weights have: of the layers themselves, since a given base has not the width
        in the settings."""
        if self.spec.mean_bits is not None:
            return self.spec.mean_bits
        weights: Counter[int] = Counter()
        for summary in self.layers.values():
            weights[summary.layout.bits] += math.prod(summary.layout.shape)
        return weights.most_common(1)[0][0]

    def grids(self) -> set[tuple[int, int | None]]:
        """Widths and group sizes of the layers."""
        return {(s.layout.bits, s.layout.group_size) for s in self.layers.values()}

    def describe_base(self) -> str:
        """`GPTQ after MagR, 2 bits, groups of 64, asymmetric`; other widths are named where rules make several."""
        quant = self.spec.quant
        widths = ", ".join(f"{bits} bits in {f'groups of {size}' if size else 'channels'}" for bits, size in sorted(self.grids(), key=str))
        grid = "" if quant.quantizer == "nf4" else ", symmetric" if quant.symmetric else ", asymmetric"
        return f"{quant.quantizer.upper()}{' after MagR' if quant.magr else ''}, {widths}{grid}"

    def describe_adapter(self) -> str:
        """`CLoQ factors of rank 64`."""
        names = {"cloq": "CLoQ", "loftq": "LoftQ", "pissa": "PiSSA", "eora": "EoRA"}
        ranks = sorted({m.rank for m in self.metrics()})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        return f"{names.get(self.spec.lora.init, self.spec.lora.init.upper())} factors of {rank}"

    def describe_calibration(self) -> str:
        """`65,536 tokens of wikitext2`; of a local source only the file's name."""
        calib = self.spec.calib
        return f"{calib.samples * calib.seq_len:,} tokens of {wording.source(calib.source)}"

    # -- derived -------------------------------------------------------------------------------------------------------

    def metrics(self) -> list[LayerMetrics]:
        return [summary.metrics for summary in self.layers.values()]

    def mean(self, key: str) -> float | None:
        """Plain mean of a metric over the layers that have it, `None` if none has: experts that no held-out token reached lack two."""
        values = [value for m in self.metrics() if (value := getattr(m, key)) is not None]
        return fmean(values) if values else None

    def repaired(self, heldout: bool = False) -> float | None:
        """Share of the mean error that the factors take away; negative where they add to it."""
        prefix = "heldout" if heldout else "error"
        return share_repaired(self.mean(f"{prefix}_quantized"), self.mean(f"{prefix}_corrected"))

    def parameters(self) -> int:
        """Weights in the quantized layers."""
        return sum(math.prod(s.layout.shape) for s in self.layers.values())

    def adapter_parameters(self) -> int:
        return sum(s.metrics.rank * sum(s.layout.shape) for s in self.layers.values())

    def bits_per_weight(self, adapter_bits: int = 0) -> float:
        """Of the quantized layers, with the factors stored in `adapter_bits` (0: without them)."""
        stored = math.fsum(s.metrics.bits_per_weight * math.prod(s.layout.shape) for s in self.layers.values())
        return (stored + adapter_bits * self.adapter_parameters()) / self.parameters()

    def blocks(self) -> list[int]:
        """Numbers of the blocks that hold a quantized layer, ascending."""
        return sorted({block for block, _ in map(place, self.layers) if block is not None})

    def kinds(self) -> dict[str, str]:
        """Kinds of layers in the order of their appearance → a short label, the last part of the name if that is unambiguous."""
        kinds = list(dict.fromkeys(place(name).kind for name in self.layers))
        last = [kind.rsplit(".", 1)[-1] for kind in kinds]
        return {kind: short if last.count(short) == 1 else kind for kind, short in zip(kinds, last, strict=True)}

    def by_kind(
        self, kind: str, value: Callable[[LayerMetrics], float | None], combine: Callable[[list[float]], float] = fmean
    ) -> dict[int, float]:
        """Block → a value, combined over the layers of one kind in it (experts are many); blocks without it are left out."""
        found: dict[int, list[float]] = {}
        for name, summary in self.layers.items():
            where = place(name)
            number = value(summary.metrics)
            if where.kind == kind and number is not None:
                found.setdefault(where.block or 0, []).append(number)
        return {block: combine(numbers) for block, numbers in sorted(found.items())}

    def worst(self, count: int) -> list[tuple[str, LayerMetrics]]:
        """The layers with the largest remaining error, largest first."""
        order = sorted(self.layers.items(), key=lambda item: -item[1].metrics.error_corrected)
        return [(name, summary.metrics) for name, summary in order[:count]]

    def layer_notes(self) -> dict[str, list[str]]:
        """Note → the layers it concerns, so that what happened to many is said once."""
        found: dict[str, list[str]] = {}
        for name, summary in self.layers.items():
            for note in summary.metrics.notes:
                found.setdefault(note, []).append(name)
        return found


def is_hub_id(model: str) -> bool:
    """Whether MODEL reads as `owner/name` and is no folder here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None and not Path(model).is_dir()


def share_repaired(before: float | None, after: float | None) -> float | None:
    """`1 − after / before`; 0 where there was no error, `None` where one is unknown."""
    if before is None or after is None:
        return None
    return 1 - after / before if before > 0 else 0.0


def stored_spectrum(metrics: LayerMetrics) -> dict[int, float]:
    """The stored eigenvalues by their number from 0: evenly spread over the rank, the first and the last among them."""
    points, rank = len(metrics.spectrum), metrics.rank
    every = points < 2 or points >= rank
    return {i if every else i * (rank - 1) // (points - 1): share for i, share in enumerate(metrics.spectrum)}


def cumulative_shares(metrics: LayerMetrics, exact: bool) -> list[float]:
    """Share of the error that the leading 1, 2, … rank directions hold.

    Eigenvalues between two stored ones are interpolated geometrically. exact: the factors are the optimum, so that all shares
    together are the share repaired; the interpolated ones are scaled to make it so.
    """
    known = stored_spectrum(metrics)
    shares = [known.get(k, 0.0) for k in range(max(known, default=-1) + 1)]
    for left, right in pairwise(known):
        a, b = max(known[left], 1e-300), max(known[right], 1e-300)
        for k in range(left + 1, right):
            shares[k] = a * (b / a) ** ((k - left) / (right - left))
    stored = math.fsum(metrics.spectrum)
    filled = math.fsum(shares) - stored
    missing = share_repaired(metrics.error_quantized, metrics.error_corrected) - stored
    if exact and filled > 0 and missing > 0:
        shares = [share if k in known else share * missing / filled for k, share in enumerate(shares)]
    return list(accumulate(shares))


def _layer(described: dict[str, Any]) -> LayerSummary:
    layout = described["layout"] | {"shape": tuple(described["layout"]["shape"])}
    metrics = {k: tuple(v) if isinstance(v, list) else v for k, v in described["metrics"].items()}
    return LayerSummary(WeightLayout(**layout), LayerMetrics(**metrics))


def _task_score(described: dict[str, Any]) -> TaskScore:
    known = {k: math.nan if v is None and k in ("stderr", "low", "high") else v for k, v in described.items()}
    return TaskScore(**known)


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""One run and its parts: what is quantized, how, and on which text."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from dataclasses import dataclass, field
from typing import Any

from cloq.specs.checked import Spec, one_of, require, shown

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, None)
QUANTIZER_NAMES = ("gptq", "rtn", "nf4")
INITIALIZER_NAMES = ("cloq", "zero", "svd", "loftq", "qera", "eora", "pissa")
SPLIT_NAMES = ("paper", "balanced")
PROPAGATE = ("adapter", "quantized", "dense")
ACTIVATIONS = ("auto", "device", "host", "disk")
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

QUANTIZER_SETTINGS = {
    **{name: ("gptq",) for name in ("damping", "act_order", "static_groups")},
    **{name: ("gptq", "rtn") for name in ("symmetric", "search")},
}
"""Settings of `QuantSpec` that not every quantizer has → those that do."""

SCALE = 1 / 16
"""With it A and B are four times as large for the same product, and a step of an optimizer such as Adam moves the outputs a quarter as far:
then factors that come first are trained best at the rates that suit LoRA's usual start (docs/log.md). Without it these rates undo them."""
INITIALIZER_SETTINGS = {"split": ("cloq",), "rounds": ("cloq",), "iterations": ("loftq",)}
"""Settings of `LoraSpec` that not every initializer has → those that do."""

RUN_SETTINGS = {"fisher": ("cloq",), "adaptive_rank": ("cloq",)}
"""Settings of `RunSpec` that are for some initializers only → those. Others refuse them where they are neither the default nor off."""


def _refuse_ignored(spec: Any, kind: str, settings: dict[str, tuple[str, ...]]) -> None:
    """Refuses a setting that the chosen algorithm would ignore, where it is not the default. kind: the field that names the algorithm."""
    chosen = getattr(spec, kind)
    defaults = {f.name: f.default for f in dataclasses.fields(spec)}
    for name, owners in settings.items():
        value = getattr(spec, name)
        require(
            chosen in owners or value == defaults[name],
            f"{name} is {value}, which {kind} {chosen!r} does not have; leave it at {defaults[name]}, or use {kind} {' or '.join(owners)}",
        )


@dataclass(frozen=True)
class QuantSpec(Spec):
    """How a weight becomes codes.

    group_size: columns that share a scale; `None` is one scale per output channel. Where it does not divide a layer's inputs the last
        group is shorter.
    search: choose each group's scale by its rounding error instead of its range.
    magr: run MagR before the quantizer. magr_alpha: weight of its penalty, `None` for 1e-4 per group and 1e-3 per channel.
    damping, act_order, static_groups: GPTQ's; nf4 has no grid to be symmetric or searched. A setting that the quantizer does not have
    is refused where it is not the default.
    """

    bits: int = 2
    group_size: int | None = 64
    quantizer: str = "gptq"
    symmetric: bool = False
    search: bool = True
    magr: bool = False
    magr_alpha: float | None = None
    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = False

    def __post_init__(self):
        one_of("bits", self.bits, BITS)
        one_of("group_size", self.group_size, GROUP_SIZES)
        one_of("quantizer", self.quantizer, QUANTIZER_NAMES)
        require(
            self.quantizer != "nf4" or self.bits == 4, f"nf4 is a 4-bit codebook; bits is {self.bits}. Use --bits 4, or --quantizer gptq"
        )
        require(self.quantizer != "nf4" or self.group_size == 64, "nf4 uses blocks of 64 values; set group_size to 64")
        require(0 <= self.damping <= 1, f"damping is {self.damping}; it is relative to the mean diagonal, between 0 and 1 (0.01 is usual)")
        alpha = self.magr_alpha
        require(alpha is None or 0 < alpha < math.inf, f"magr_alpha is {alpha}; it must be positive and finite")
        require(self.magr_alpha is None or self.magr, f"magr_alpha is {self.magr_alpha}, but magr is off; add --magr or leave it out")
        _refuse_ignored(self, "quantizer", QUANTIZER_SETTINGS)


@dataclass(frozen=True)
class LoraSpec(Spec):
    """How the factors are found.

    rank: clipped per layer to `min(in, out)`.
    split, rounds: CLoQ's: see `closed_form`, and how often codes are chosen for the factors and factors for the codes (0: the paper's).
    iterations: LoftQ's rounds. Each is refused elsewhere where it is not the default.
    """

    init: str = "cloq"
    rank: int = 64
    split: str = "balanced"
    rounds: int = 8
    iterations: int = 5

    def __post_init__(self):
        one_of("init", self.init, INITIALIZER_NAMES)
        one_of("split", self.split, SPLIT_NAMES)
        require(1 <= self.rank <= 4096, f"rank is {self.rank}; allowed: 1 to 4096 (16 to 128 is usual)")
        require(0 <= self.rounds <= 100, f"rounds is {self.rounds}; allowed: 0 to 100 (0 to 16 is usual)")
        require(1 <= self.iterations <= 100, f"iterations is {self.iterations}; allowed: 1 to 100")
        _refuse_ignored(self, "init", INITIALIZER_SETTINGS)

    def rounds_on(self, given: bool) -> int:
        """How often codes are chosen for the factors: never where the codes are given, or by an initializer that has no rounds."""
        return self.rounds if self.init in INITIALIZER_SETTINGS["rounds"] and not given else 0

    def scale_on(self, given: bool) -> float:
        """What PEFT multiplies the product of the exported factors by, `alpha / r`: `SCALE` where they hold most of the weight."""
        return SCALE if self.split == "balanced" and self.rounds_on(given) else 1.0


@dataclass(frozen=True)
class CalibSpec(Spec):
    """Which text is run through the model.

    source: `demo`, `self`, `c4`, `wikitext2`, `pile`, a hub data set `owner/name[:config[:split]]`, a local file or folder, or a mixture
        `a:0.5,b:0.5` of these. column: of the data set, where it is not found by itself.
    samples: sequences of `seq_len` tokens for the Gram matrices. heldout: further sequences, a share of `samples`, for the held-out error.
    seed: of the choice of sequences.
    """

    source: str = "wikitext2"
    samples: int = 128
    seq_len: int = 2048
    heldout: float = 0.125
    column: str | None = None
    seed: int = 0

    def __post_init__(self):
        require(bool(self.source.strip()), "the calibration source is empty; name one, such as --calib wikitext2 or --calib text.jsonl")
        require(1 <= self.samples <= 1_000_000, f"calibration samples is {self.samples}; allowed: 1 to 1000000 (128 is usual)")
        require(8 <= self.seq_len <= 1_000_000, f"seq_len is {self.seq_len}; allowed: 8 to the model's context (2048 is usual)")
        require(-(2**63) <= self.seed < 2**64, f"seed is {shown(self.seed)}; it is a number of 64 bits")
        require(0 <= self.heldout <= 1, f"heldout is {self.heldout}; it is a share of the samples between 0 and 1")

    @property
    def heldout_samples(self) -> int:
        """Sequences for the held-out error: the share rounded up, so that any share above 0 gives at least one."""
        return -int(-self.samples * self.heldout // 1)


@dataclass(frozen=True)
class Rule(Spec):
    """What is different for the modules that `match` names: another width, group, rank, or left dense. See `matches`."""

    match: str
    bits: int | None = None
    group_size: int | None = None
    rank: int | None = None
    dense: bool = False

    def __post_init__(self):
        require(bool(self.match), "a rule needs a pattern in `match`")
        require(self.bits is None or self.bits in BITS, f"rule {self.match!r}: bits is {self.bits}; allowed: {', '.join(map(str, BITS))}")
        one_of(f"rule {self.match!r}: group_size", self.group_size, GROUP_SIZES)
        require(self.rank is None or 1 <= self.rank <= 4096, f"rule {self.match!r}: rank is {self.rank}; allowed: 1 to 4096")


def matches(pattern: str, name: str) -> bool:
    """Whether a shell-style pattern names a module: the whole dotted name, or its end after a dot (`q_proj`, `mlp.*`, `*.layers.0.*`)."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, "*." + pattern)


@dataclass(frozen=True)
class RunSpec(Spec):
    """One whole run.

    model: hub id or folder; revision: of the hub id. only / skip: patterns of modules to take or to leave dense. rules: exceptions.
    quantized: folder of a base that someone else quantized; its codes are taken as they are and only the factors are found (`cloq init`).
    propagate: what later layers are calibrated on: the outputs of `Q + BA` (`adapter`), of `Q` (`quantized`) or of the original (`dense`).
    sequential: inside a block, later layers see the earlier ones already quantized; otherwise one forward serves the whole block.
    correction: how much of what the layers before have done wrong each layer is asked to make up for (see `cloq.algebra.drift`): `None`
        for what helps held-out text the most, layer by layer, or a share for all layers; 0 is the published method. Where later layers
        are calibrated on the original's outputs there is nothing to make up for.
    fisher: share of what an output counts for CLoQ's factors that is how much the loss depends on it (see `cloq.streaming.fisher`); the
        rest is the same for all. 0 is the published method, and needs no backward pass.
    mean_bits: what weights get on average, of 2, 3 and 4 bits, in place of the width in `quant`; each layer gets what lowers the loss the
        most (see `cloq.streaming.survey`). Layers that share an input, which servers hold as one, get the same width.
    adaptive_rank: the rank is what layers get on average, in parameters of the factors; each gets what lowers the loss the most.
    device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`. batch_tokens: tokens per forward. activations: where they are between forwards, on the
        device, in host memory or in files of the output folder; `auto` takes the first of them that they leave room.
    trust_remote_code: run Python code that comes with the model. Off, and never needed by the families that are tested.
    """

    model: str = DEFAULT_MODEL
    revision: str | None = None
    quantized: str | None = None
    quant: QuantSpec = field(default_factory=QuantSpec)
    lora: LoraSpec = field(default_factory=LoraSpec)
    calib: CalibSpec = field(default_factory=CalibSpec)
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    propagate: str = "adapter"
    sequential: bool = True
    correction: float | None = None
    fisher: float = 0.9
    mean_bits: float | None = None
    adaptive_rank: bool = False
    device: str = "auto"
    batch_tokens: int = 2048
    activations: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self):
        one_of("propagate", self.propagate, PROPAGATE)
        one_of("activations", self.activations, ACTIVATIONS)
        require(bool(self.model), "the model is empty; name a hub id or a folder")
        require(
            self.quantized is None or self.lora.init not in ("loftq", "pissa"),
            f"init {self.lora.init!r} changes the quantized weight and cannot be fitted to a given base; use cloq, eora, qera, svd or zero",
        )
        share = self.correction
        require(share is None or 0 <= share <= 1, f"correction is {share}; it is a share between 0 (off) and 1")
        require(
            not self.chooses_correction or self.calib.heldout_samples > 0,
            "how much each layer makes up for is chosen on held-out text, and heldout is 0; give a share of the sequences, such as "
            "--heldout 0.125, or the same for all layers, such as --correction 0.5",
        )
        require(0 <= self.fisher < 1, f"fisher is {self.fisher}; it is a share from 0 (off) to below 1")
        for name, owners in RUN_SETTINGS.items():
            value = getattr(self, name)
            require(
                self.lora.init in owners or not value or value == getattr(type(self), name),
                f"{name} is {value}, which init {self.lora.init!r} makes no use of; leave it out, or use --init cloq",
            )
        mean = self.mean_bits
        require(mean is None or 2 <= mean <= 4, f"the mean width is {mean} bits; it is made of 2, 3 and 4 bits, so it lies between 2 and 4")
        require(mean is None or self.quant.quantizer != "nf4", "nf4 has 4 bits and no others; leave the mean width out, or use gptq or rtn")
        require(
            mean is None or self.quantized is None, f"the mean width is {mean} bits, but the base is given and has its own; leave it out"
        )
        require(self.batch_tokens >= 1, f"batch_tokens is {self.batch_tokens}; it must be at least 1")

    @property
    def corrects(self) -> bool:
        """Whether the original model's activations go along, for later layers to make up for earlier ones."""
        return self.correction != 0 and self.propagate != "dense"

    @property
    def chooses_correction(self) -> bool:
        """Whether how much each layer makes up for is chosen on held-out text."""
        return self.correction is None and self.corrects

    @property
    def weighs_outputs(self) -> bool:
        """Whether the factors are to know how much the loss depends on each output."""
        return self.fisher > 0 and self.lora.init in RUN_SETTINGS["fisher"]

    @property
    def spends(self) -> bool:
        """Whether widths or ranks are means, to be spent where the loss depends on them most."""
        return self.mean_bits is not None or self.adaptive_rank

    @property
    def follows_back(self) -> bool:
        """Whether the loss's gradients are asked for."""
        return self.weighs_outputs or self.spends

    @property
    def one_by_one(self) -> bool:
        """Whether layers are calibrated behind those before them in their block."""
        return self.sequential and self.propagate != "dense"


@dataclass(frozen=True)
class LayerSpec(Spec):
    """What one module gets, after patterns and rules: `dense` leaves it as it is."""

    quant: QuantSpec
    rank: int
    dense: bool = False


def layer_spec(run: RunSpec, name: str) -> LayerSpec:
    """Resolves `only`, `skip` and `rules` for one module; of several matching rules the last one wins, setting by setting."""
    chosen = not run.only or any(matches(p, name) for p in run.only)
    dense = not chosen or any(matches(p, name) for p in run.skip)
    quant, rank = run.quant, run.lora.rank
    for rule in run.rules:
        if matches(rule.match, name):
            changes = {key: getattr(rule, key) for key in ("bits", "group_size") if getattr(rule, key) is not None}
            quant, rank, dense = quant.replace(**changes), rule.rank or rank, dense or rule.dense
    return LayerSpec(quant, rank, dense)


def ruled(run: RunSpec, name: str, setting: str) -> bool:
    """Whether a rule says what this setting (`bits`, `rank`, …) is for a module."""
    return any(getattr(rule, setting) is not None for rule in run.rules if matches(rule.match, name))


def mixes(run: RunSpec, name: str) -> bool:
    """Whether a module's width is chosen within the run's mean."""
    return run.mean_bits is not None and not ruled(run, name, "bits")

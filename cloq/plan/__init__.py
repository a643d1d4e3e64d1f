"""`cloq plan`: the work, time, memory and disk that a run will take, before anything starts and without reading a weight.

work      units of work, and how fast this machine is in each
forward   what a forward of a block costs, and which layers share an input
algebra   what a layer's quantization and factors cost
storage   bytes in memory and on disk
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cloq.models import Decoder
from cloq.plan import algebra, rounds, storage
from cloq.plan.forward import BlockForward, block_forwards
from cloq.plan.work import Machine, Work, measure
from cloq.report import wording
from cloq.specs import LayerSpec, RunSpec
from cloq.streaming import survey
from cloq.streaming.memory import free_memory, spare_memory

FASTER, SLOWER = 0.7, 1.6
"""A run that is left alone is expected between these multiples of the estimate. Measured on one busy core, the large phases of
SmolLM2's blocks took 1.1 to 1.2 times theirs; GPUs and many cores were not measured."""

_PREDICTED = 50.0  # passes over a token's logits: what a softmax and a running sum take as long as

AROUND = 6.0
"""Seconds of every run that do not grow with it: imports, reading text, the report."""


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    model: its folder's or hub name. blocks; layers: how many are quantized; dense: linear layers that stay as they are.
    parameters: of the whole model; quantized: of the layers that are. tokens, heldout: calibration and held-out tokens.
    work: by phase, as a run times them. machine: measured. memory, device_memory: bytes of the host's and of a GPU's at the fullest moment
    of the run, by what holds them. disk: bytes written, by folder. original: bytes of the checkpoint.
    bits: per weight of the quantized layers, by adapter (`none`, `16-bit`, `32-bit`). notes: what could not be known.
    """

    model: str
    device: str
    blocks: int
    layers: int
    dense: int
    parameters: int
    quantized: int
    tokens: int
    heldout: int
    work: dict[str, Work]
    machine: Machine
    memory: dict[str, int]
    device_memory: dict[str, int]
    disk: dict[str, int]
    original: int
    bits: dict[str, float]
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> dict[str, float]:
        """Estimated seconds by phase; `around` is what every run needs besides."""
        return {phase: work.seconds(self.machine) for phase, work in self.work.items()} | {"around": AROUND}

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the derived ones."""
        total = sum(self.seconds.values())
        derived = {
            "seconds": self.seconds,
            "seconds_total": total,
            "seconds_range": [FASTER * total, SLOWER * total],
            "operations": {phase: work.products + work.wide for phase, work in self.work.items()},
            "memory_total": sum(self.memory.values()),
            "device_memory_total": sum(self.device_memory.values()),
            "disk_total": sum(self.disk.values()),
        }
        return asdict(self) | {"notes": list(self.notes)} | derived

    def lines(self) -> list[str]:
        """The plan for people."""
        return [*self._what(), "", *self._time(), "", *self._space(), *(f"note: {note}" for note in self.notes)]

    def _what(self) -> list[str]:
        left = f", {wording.plural(self.dense, 'layer')} left as they are" if self.dense else ""
        return [
            f"{self.model}: {wording.short_count(self.parameters)} parameters, {wording.size(self.original)} on disk",
            f"{wording.plural(self.layers, 'layer')} in {wording.plural(self.blocks, 'block')} to quantize"
            f" ({wording.short_count(self.quantized)} weights){left}",
            f"calibration on {self.tokens:,} tokens, {self.heldout:,} held out",
        ]

    def _time(self) -> list[str]:
        seconds = self.seconds
        total = sum(seconds.values())
        lines = [f"time    {time_range(total)} on {self.device}, if left alone ({self.machine.products / 1e9:,.0f} GFLOP/s measured)"]
        for phase, value in seconds.items():
            if value >= 0.005 * total:
                lines.append(f"  {phase:<10} {wording.percent(value / total):>5}   {_operations(self.work.get(phase, Work()))}".rstrip())
        return lines

    def _space(self) -> list[str]:
        device = [f"        about {_held(self.device_memory)} on {self.device}"] if self.device_memory else []
        written = ", ".join(f"{name} {wording.size(value)}" for name, value in self.disk.items())
        return [
            f"memory  about {_held(self.memory)}",
            *device,
            f"disk    {wording.size(sum(self.disk.values()))} ({written})",
            f"result  {self.bits['none']:.2f} bits per weight, {self.bits['16-bit']:.2f} with a 16-bit adapter,"
            f" {self.bits['32-bit']:.2f} as it is stored, in 32 bits",
        ]


def plan(spec: RunSpec, decoder: Decoder, machine: Machine | None = None, spare: int | None = None) -> Plan:
    """Plans a run on a model that is open. machine: measured here if not given. spare: bytes for what would else be computed again; what
    a run would take here if not given.

    Raises what `layers.plan_layers` raises: patterns that name nothing, nothing left to quantize, experts that cannot be taken apart.
    """
    from cloq.streaming.layers import foreseen, plan_layers

    specs = foreseen(spec, plan_layers(spec, decoder), decoder)
    shapes = decoder.linear_shapes()
    chosen = {name: layer for name, layer in specs.items() if not layer.dense}
    forwards, note = block_forwards(decoder, spec.calib.seq_len)
    notes = [note] if note else []
    notes += _clipped(chosen, shapes)
    if spec.calib.source.startswith("self"):
        notes.append("the time to sample the calibration text from the model comes on top")
    needed = storage.kept(spec, decoder, chosen, forwards)
    spare = min(needed, spare_memory(decoder.device) if spare is None else spare)
    sizes = storage.Sizes.of(spec, decoder, chosen, shapes)
    waits = storage.waiting(spec, decoder)
    memory, device_memory = storage.peak_memory(spec, decoder, chosen, shapes, forwards, sizes, spare, waits)
    notes += _short_of(memory, torch.device("cpu")) + _short_of(device_memory, decoder.device)
    return Plan(
        model=spec.model,
        device=str(decoder.device),
        blocks=len(decoder.blocks),
        layers=len(chosen),
        dense=len(specs) - len(chosen),
        parameters=sizes.parameters,
        quantized=sum(math.prod(shapes[name]) for name in chosen),
        tokens=spec.calib.samples * spec.calib.seq_len,
        heldout=spec.calib.heldout_samples * spec.calib.seq_len,
        work=_phases(spec, decoder, chosen, shapes, forwards, sizes, spare / needed if needed else 0.0, waits),
        machine=machine or measure(decoder.device),
        memory=memory,
        device_memory=device_memory,
        disk=sizes.written() | {f"{name} while it runs": waited.size for name, waited in waits.items() if waited.place == "disk"},
        original=sizes.original,
        bits=sizes.bits,
        notes=tuple(notes),
    )


def _clipped(chosen: dict[str, LayerSpec], shapes: dict[str, storage.Shape]) -> list[str]:
    clipped = [name for name, layer in chosen.items() if layer.rank > min(shapes[name])]
    most = f"; {clipped[0]} allows {min(shapes[clipped[0]])}" if clipped else ""
    return [f"the rank will be clipped in {wording.plural(len(clipped), 'layer')}{most}"] if clipped else []


def _short_of(memory: dict[str, int], device: torch.device) -> list[str]:
    """A note where less is free than a run needs beside the process, which this one has already."""
    needed, free = sum(memory.values()) - memory.get("process", 0), free_memory(device)
    if free is None or needed <= free:
        return []
    instead = "fewer --calib-samples or a smaller --seq-len"
    if storage.ACTIVATIONS in memory:
        instead = f"--activations {'disk' if device.type == 'cpu' else 'host'}, {instead}"
    return [
        f"beside the process this takes about {rough(needed)} on {device}, where {rough(free)} are free: the run would be ended, or"
        f" would go on in smaller batches; less memory is needed with {instead}"
    ]


def _phases(
    spec: RunSpec, decoder: Decoder, chosen: dict[str, LayerSpec], shapes: dict[str, storage.Shape], forwards: list[BlockForward],
    sizes: storage.Sizes, kept: float, waits: dict[str, storage.Waiting],
) -> dict[str, Work]:  # fmt: skip
    """Work by phase as `pipeline.quantize_blocks` goes through them. kept: the share of what can be kept that there is memory for.
    waits: as of `storage.waiting`."""
    calib = spec.calib
    sequences, tokens = calib.samples + calib.heldout_samples, (calib.samples + calib.heldout_samples) * calib.seq_len
    beside = spec.corrects  # the original model's own activations
    phases = {
        name: Work() for name in ("embed", "gradients", "survey", "load", "capture", "solve", "apply", "store", "propagate", "export")
    }
    phases["embed"] = (1 + beside) * Work(disk=3 * sizes.outer, streamed=8.0 * tokens * decoder.width)
    if spec.follows_back:
        phases["gradients"] = _gradients(spec, decoder, forwards, sizes)
    if spec.spends:
        phases["survey"] = _survey(spec, decoder, chosen, shapes, forwards, sizes)
    written, read = _paged(waits[storage.ACTIVATIONS])
    last = max(index for index in range(len(forwards)) if any(name in chosen for name in decoder.linears(index)))
    for index, forward in enumerate(forwards):
        prefix = decoder.block_name(index) + "."
        group_of = {prefix + name: group for group in forward.groups for name in group.names}
        groups = forward.chosen(prefix, chosen)
        together = decoder.rounds(groups, spec.one_by_one)
        asked = [[name.removeprefix(prefix) for names in groups for name in names] for groups in together]
        phases["capture"] += len(together) * read
        if index < last:
            phases["propagate"] += read + written
        for parts, share in ((True, kept), (False, 1 - kept)):
            for original, to_sums, times in ((False, beside, sequences), (True, True, beside * sequences)):
                possible = storage.parts_kept(spec, forward, prefix, chosen, original) if parts else ()
                captured, onwards = rounds.forwards(forward, asked, possible, original or spec.propagate == "dense", to_sums)
                phases["capture"] += share * times * captured
                if index < last:
                    phases["propagate"] += share * times * onwards
        for names in (names for groups in together for names in groups):
            phases["capture"] += algebra.gram(shapes[names[0]][1], sequences * group_of[names[0]].tokens)
            drifts = beside and not decoder.expert_layers.keys() & set(names)
            if drifts:
                ends = {prefix + part.last for part in forward.parts}  # most are added to the residual stream, which takes less
                added, columns = bool(ends & set(names)), shapes[names[0]][1]
                rows = sum(shapes[name][0] for name in names) if added else columns
                phases["capture"] += algebra.drift(rows, columns, sequences * group_of[names[0]].tokens, added)
                phases["solve"] += Work() if spec.chooses_correction else algebra.damped_cholesky(shapes[names[0]][1])
            for name in names:
                layer, rank = chosen[name], min(chosen[name].rank, *shapes[name])
                given = spec.quantized is not None
                phases["solve"] += algebra.solve(shapes[name], layer.quant, spec.lora, rank, calib.heldout_samples > 0, given)
                phases["solve"] += algebra.corrected(shapes[name], spec.chooses_correction) if drifts else Work()
                phases["apply"] += algebra.apply(shapes[name], rank) if spec.propagate != "dense" else Work()
        phases["load"] += Work(disk=sizes.element * decoder.block_parameters(index), streamed=6.0 * decoder.block_parameters(index))
    phases["store"] = Work(disk=sizes.store)
    phases["export"] = Work(disk=sizes.original + sizes.store + sizes.base + sizes.adapter)
    return phases


def _paged(activations: storage.Waiting) -> tuple[Work, Work]:
    """Writing all activations, where they are on disk, and reading them, unless memory holds them beside everything else."""
    if activations.place != "disk":
        return Work(), Work()
    free = free_memory(torch.device("cpu"))
    work = Work(disk=activations.size)
    return work, work if free is None or activations.size > free else Work()


def _gradients(spec: RunSpec, decoder: Decoder, forwards: list[BlockForward], sizes: storage.Sizes) -> Work:
    """Every block forwards, and once more to be followed back, which takes as much again; the head alike, but once forwards."""
    sequences = storage.followed_back(spec) / spec.calib.seq_len
    blocks = 3.0 * sequences * sum((forward.whole for forward in forwards), Work())
    config = decoder.config.get_text_config()
    logits = storage.followed_back(spec) * config.vocab_size
    head = Work(products=2 * 2.0 * logits * config.hidden_size, streamed=_PREDICTED * 4.0 * logits)
    return blocks + head + Work(disk=2.0 * sizes.original)


def _survey(
    spec: RunSpec, decoder: Decoder, chosen: dict[str, LayerSpec], shapes: dict[str, storage.Shape], forwards: list[BlockForward],
    sizes: storage.Sizes,
) -> Work:  # fmt: skip
    """Every block forwards, what is kept of it aside; a layer rounded and decomposed at each width that it may get."""
    tokens = storage.followed_back(spec)
    work = Work(disk=sizes.original)
    for index, forward in enumerate(forwards):
        prefix = decoder.block_name(index) + "."
        groups = forward.chosen(prefix, chosen)
        captured, onwards = rounds.forwards(
            forward, [[name.removeprefix(prefix) for names in together for name in names] for together in decoder.rounds(groups, True)],
            forward.parts, original=True, to_sums=False,
        )  # fmt: skip
        work += tokens / spec.calib.seq_len * (captured + onwards)
        for names in groups:
            work += algebra.gram(shapes[names[0]][1], tokens)
            for name in names:
                widths, ranks = survey.possible(spec, name, chosen[name], shapes[name])
                quantized = Work() if spec.quantized else algebra.quantize(shapes[name], chosen[name].quant)
                decomposed = algebra.top_eigenvectors(shapes[name], max(ranks), whole_gram=True)
                in_rounds = spec.lora.rounds_on(given=spec.quantized is not None) > 0
                work += len(widths) * (quantized + decomposed) + in_rounds * decomposed
    return work


def _operations(work: Work) -> str:
    total = work.products + work.wide
    return f"{total / 1e12:,.3g} T operations" if total >= 1e9 else ""


def time_range(seconds: float) -> str:
    """`2 to 5 minutes`: from the faster to the slower end, a digit each."""
    low, high = FASTER * seconds, SLOWER * seconds
    if high < 2:
        return "a second or two"
    for unit, size in (("seconds", 1), ("minutes", 60), ("hours", 3600), ("days", 86400)):
        if high / size < 100 or unit == "days":
            break
    short, long = (_one_digit(value / size, up) for value, up in ((low, False), (high, True)))
    return f"{short:g} to {long:g} {unit}" if short else f"up to {long:g} {unit}"


def _one_digit(value: float, up: bool) -> float:
    step = 10.0 ** math.floor(math.log10(value)) if value >= 1 else 0.5
    return step * (math.ceil(value / step) if up else math.floor(value / step))


def _held(memory: dict[str, int]) -> str:
    """The sum, and its parts from the largest on."""
    parts = ", ".join(f"{name} {rough(value)}" for name, value in sorted(memory.items(), key=lambda item: -item[1]) if value)
    return f"{rough(sum(memory.values()))} ({parts})"


def rough(value: float) -> str:
    """Bytes to one significant digit, two below 2 of a unit: `600 MB`, `1.4 GB`, `30 GB`."""
    if value <= 0:
        return "0 B"
    lead = value / 10 ** math.floor(math.log10(value))
    step = 10 ** math.floor(math.log10(value)) * (0.1 if lead < 2 else 0.5 if lead < 5 else 1)
    return wording.size(step * round(value / step))

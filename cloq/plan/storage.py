"""Bytes: what a run writes, and what it holds in memory at its fullest moment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cloq.export.folder import SHARD_BYTES
from cloq.models import Decoder, given_bytes
from cloq.models.gradients import AT_A_TIME, LENGTH
from cloq.plan.forward import BlockForward, Part
from cloq.plan.rounds import kept_bytes
from cloq.report.record import STORED_ADAPTER_BITS
from cloq.specs import LayerSpec, QuantSpec, RunSpec
from cloq.streaming.device import place_aside, place_to_wait
from cloq.streaming.fisher import TOKENS

Shape = tuple[int, int]

ACTIVATIONS, GIVEN = "activations", "what blocks were given"

PROCESS = 500e6
"""The Python process with torch and transformers, before any model is there."""


_LIVE = 6  # tensors of the largest size that a block's forward holds at a time


@dataclass(frozen=True)
class Sizes:
    """parameters: in the checkpoint. original: its bytes; element: bytes of one of its values, on average.
    outer: bytes of everything but the blocks. store, base, adapter: bytes that are written; base is 0 where it is given.
    bits: per weight, by adapter."""

    parameters: int
    original: int
    element: float
    outer: float
    store: int
    base: int
    adapter: int
    bits: dict[str, float]

    def written(self) -> dict[str, int]:
        base = {"base": self.base} if self.base else {}
        return base | {"adapter": self.adapter, "finished blocks": self.store}

    @classmethod
    def of(cls, spec: RunSpec, decoder: Decoder, chosen: dict[str, LayerSpec], shapes: dict[str, Shape]) -> Sizes:
        parameters = sum(math.prod(decoder.checkpoint.shape(name)) for name in decoder.checkpoint.names)
        original = sum(path.stat().st_size for path in decoder.folder.glob("*.safetensors"))
        element = original / parameters
        weights = sum(math.prod(shapes[name]) for name in chosen)
        packed = sum(quantized_bits(shapes[name], layer.quant) for name, layer in chosen.items())
        factors = sum(min(layer.rank, *shapes[name]) * sum(shapes[name]) for name, layer in chosen.items())
        indices = sum(32 * shapes[name][1] for name, layer in chosen.items() if layer.quant.quantizer != "nf4")
        adapter = factors * STORED_ADAPTER_BITS // 8
        blocks = sum(decoder.block_parameters(index) for index in range(len(decoder.blocks)))
        return cls(
            parameters=parameters,
            original=original,
            element=element,
            outer=element * max(parameters - blocks, 0),
            store=(packed + indices) // 8 + adapter,
            base=0 if spec.quantized else int(original - element * weights) + (packed + indices) // 8,
            adapter=adapter,
            bits={
                "none": packed / weights,
                "16-bit": (packed + 16 * factors) / weights,
                "32-bit": (packed + 32 * factors) / weights,
            },
        )


def quantized_bits(shape: Shape, quant: QuantSpec) -> int:
    """Stored bits of codes, scales and zero points: `QuantizedWeight.storage_bits`, `CodebookWeight.storage_bits`."""
    out, columns = shape
    if quant.quantizer == "nf4":
        return out * columns * 4 + math.ceil(out * columns / 64) * 32
    groups = 1 if quant.group_size is None else math.ceil(columns / quant.group_size)
    return out * columns * quant.bits + out * groups * (16 + quant.bits)


def followed_back(spec: RunSpec) -> int:
    """Tokens whose loss is followed back through the model; see `cloq.streaming.fisher`."""
    return spec.calib.seq_len * min(spec.calib.samples, math.ceil(TOKENS / spec.calib.seq_len))


@dataclass(frozen=True)
class Waiting:
    """What waits for its forwards: its bytes, and where: `device`, `host` or `disk`; see `cloq.streaming.device`."""

    size: int
    place: str


def waiting(spec: RunSpec, decoder: Decoder) -> dict[str, Waiting]:
    """By the name that the plan has for it."""
    calib = spec.calib
    streams = (1 + spec.corrects) * (calib.samples + calib.heldout_samples)
    activations = streams * calib.seq_len * decoder.bytes_of_a_token
    found = {ACTIVATIONS: Waiting(activations, place_to_wait(spec, decoder.device, activations))}
    if spec.follows_back:
        given = given_bytes(decoder, followed_back(spec))
        found[GIVEN] = Waiting(given, place_aside(spec, given))
    return found


def peak_memory(
    spec: RunSpec, decoder: Decoder, chosen: dict[str, LayerSpec], shapes: dict[str, Shape], forwards: list[BlockForward],
    sizes: Sizes, spare: float, waits: dict[str, Waiting],
) -> tuple[dict[str, int], dict[str, int]]:  # fmt: skip
    """In host memory, and on a GPU if there is one: the fullest of a few moments, by what holds the bytes: the way in, a loss being
    followed back, a block being solved, the result being exported. spare: bytes of what is kept of a block. waits: as of `waiting`.

    Pages of files that the system keeps because nothing else needs the room are not counted.
    """
    held = {name: float(waited.size) for name, waited in waits.items() if waited.place != "disk"}
    activations = {name: size for name, size in held.items() if name == ACTIVATIONS}
    entering = activations | {"embeddings": 4.0 * decoder.outer_parameters(head=False)}
    backwards = {name: size for name, size in held.items() if name == GIVEN}
    backwards["gradients"] = 2.0 * followed_back(spec) * decoder.bytes_of_a_token  # and what the last block returned
    losing = backwards | {
        "embeddings": 4.0 * sizes.outer / sizes.element,
        "logits": 4 * 4.0 * min(AT_A_TIME, spec.calib.seq_len) * decoder.config.get_text_config().vocab_size,
    }
    following = backwards | {
        "a block": 4.0 * max(decoder.block_parameters(index) for index in range(len(decoder.blocks))),
        "a backward pass": _kept_for_gradients(spec, decoder, shapes, forwards),
    }
    solving = activations | _solving(spec, decoder, chosen, shapes, forwards, spare)
    exporting = {"a shard being written": 2.0 * max(min(sizes.base, SHARD_BYTES), sizes.adapter)}
    moments = (entering, solving, exporting, *([losing, following] if spec.follows_back else []))
    if decoder.device.type == "cpu":
        return {"process": int(PROCESS)} | _fullest(moments), {}
    host = {name for name, waited in waits.items() if waited.place == "host"} | {"a shard being written"}
    here = [{name: value for name, value in moment.items() if name in host} for moment in moments]
    there = [{name: value for name, value in moment.items() if name not in host} for moment in moments]
    return {"process": int(PROCESS)} | _fullest(here), _fullest(there)


def _kept_for_gradients(spec: RunSpec, decoder: Decoder, shapes: dict[str, Shape], forwards: list[BlockForward]) -> float:
    """Bytes that a micro-batch holds on its way back through a block: inputs and outputs of the linear layers, and a gradient for each.
    What lies between them (activation functions, norms, attention) keeps about as much as layers that share an input count twice."""
    length = min(LENGTH, spec.calib.seq_len)
    tokens = min(followed_back(spec), max(1, spec.batch_tokens // length) * length)

    def values(index: int) -> int:
        """Of one sequence, in the linear layers."""
        prefix = decoder.block_name(index) + "."
        return sum(group.tokens * sum(shapes[prefix + name]) for group in forwards[index].groups for name in group.names)

    return 2 * 4.0 * tokens / spec.calib.seq_len * max(map(values, range(len(forwards))))


def _fullest(moments: Sequence[dict[str, float]]) -> dict[str, int]:
    return {name: int(value) for name, value in max(moments, key=lambda parts: sum(parts.values())).items()}


def _solving(
    spec: RunSpec, decoder: Decoder, chosen: dict[str, LayerSpec], shapes: dict[str, Shape], forwards: list[BlockForward], spare: float,
) -> dict[str, float]:  # fmt: skip
    def matrices(name: str) -> int:
        """Sums over the calibration tokens and over the held-out ones, of both the drift too, which experts have none of."""
        return (1 + (spec.calib.heldout_samples > 0)) * (1 + (spec.corrects and name not in decoder.expert_layers))

    grams = []
    for index, forward in enumerate(forwards):
        prefix = decoder.block_name(index) + "."
        rounds = decoder.rounds(forward.chosen(prefix, chosen), spec.one_by_one)
        grams.append(
            max((sum(matrices(names[0]) * 4.0 * shapes[names[0]][1] ** 2 for names in together) for together in rounds), default=0.0)
        )
    batch = max(1, spec.batch_tokens // spec.calib.seq_len)
    running = _LIVE * batch * max(forward.largest for forward in forwards)
    return {
        "a block": (2 if spec.corrects else 1) * 4.0 * max(decoder.block_parameters(index) for index in range(len(decoder.blocks))),
        "Gram matrices": max(grams),
        "kept in a block": spare,
        "at work": max(running, *(_solving_layer(shapes[name]) for name in chosen)),
    }


def parts_kept(
    spec: RunSpec, forward: BlockForward, prefix: str, chosen: dict[str, LayerSpec], original: bool
) -> tuple[Part, ...]:  # fmt: skip
    """The parts of a block that the original model, or the one being compressed, does not run again."""
    if original or spec.propagate == "dense":
        return forward.parts
    return tuple(part for part in forward.parts if prefix + part.last in chosen) if spec.one_by_one else ()


def kept(spec: RunSpec, decoder: Decoder, chosen: dict[str, LayerSpec], forwards: list[BlockForward]) -> float:
    """Bytes that the parts of the largest block take which are not run again, if there is room for all."""
    most, sequences = 0.0, spec.calib.samples + spec.calib.heldout_samples
    for index, forward in enumerate(forwards):
        prefix = decoder.block_name(index) + "."
        own = kept_bytes(parts_kept(spec, forward, prefix, chosen, original=False), spec.propagate == "dense")
        most = max(most, sequences * (own + spec.corrects * kept_bytes(forward.parts, original=True)))
    return most


def _solving_layer(shape: Shape) -> float:
    """Temporaries of the largest step of a layer: GPTQ's factor, which stays, and two more matrices while it is found; the factors' solve
    three `(out, in)` ones, in float64 at worst; a few float32 copies of the weight live beside either."""
    out, columns = shape
    return 24.0 * out * columns + 4.0 * columns**2 + max(2 * 4.0 * columns**2, 3 * 8.0 * out * columns)

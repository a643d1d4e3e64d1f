"""The one loop: block after block, capture → quantize → factors → store → next block's inputs.

A killed run is executed again with the same settings: finished blocks are read back and only their forward is repeated, so the
activations, and with them every later byte, are the same as in an undisturbed run. If all blocks are finished nothing is run at all.

Of several processes each streams its own sequences through all blocks. Their Gram matrices are summed, the layers shared out, and everyone
gets all results; the first process alone reads and writes the store. See `cloq.streaming.distributed`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cloq.algebra.drift import Drift, corrected, corrected_by_heldout
from cloq.calibration import CalibrationTokens
from cloq.errors import ModelError, SpecError
from cloq.models import Batch, Decoder, Forwards, Kind, Kinds, Reference, Room, linear_shape, set_weight
from cloq.specs import LayerSpec, RunSpec
from cloq.streaming.capture import groups_of, statistics, top_up_experts
from cloq.streaming.device import elsewhere, place_to_wait, waiting_in
from cloq.streaming.distributed import ALONE, Processes, shared_out
from cloq.streaming.fisher import output_weights, squared_gradients_of
from cloq.streaming.layers import plan_layers
from cloq.streaming.manifest import manifest
from cloq.streaming.memory import is_out_of_memory, spare_memory, with_less_memory
from cloq.streaming.solve import solve_layer
from cloq.streaming.store import Store, differences
from cloq.streaming.survey import budgeted
from cloq.types import GivenBase, LayerResult, LayerStats

Emit = Callable[[str, dict[str, Any]], None]
"""Receives what happens, as a name and plain values: `damaged`, `memory`, `start`, `replay`, `layer`, `block`, `phase`, `done`."""

FORWARDS = ("embed", "gradients", "survey", "capture", "propagate")
"""Phases whose memory grows with the micro-batch."""


def quantize_blocks(
    spec: RunSpec, decoder: Decoder, tokens: CalibrationTokens, store: Store, emit: Emit, *,
    restart: bool = False, given: GivenBase | None = None, processes: Processes = ALONE,
) -> None:  # fmt: skip
    """Runs the loop until every block is stored. `store` must be locked by the caller. given: take these codes instead of quantizing.
    processes: that all call this, with all of the tokens, inside of `processes.together()`.

    Raises `ModelError` for weights that cannot be quantized, `SpecError` for patterns that name nothing, `RunError` for the folder.
    """
    layers = plan_layers(spec, decoder)
    if given is not None:
        layers = {name: layer.replace(dense=layer.dense or name not in given.names) for name, layer in layers.items()}
        if all(layer.dense for layer in layers.values()):
            raise SpecError("none of the layers that --only, --skip and the rules leave is quantized in the given base")
    about = manifest(spec, decoder, tokens, given)
    _refuse_differing(processes, about | {"device": decoder.device.type})
    processes.on_first(lambda: store.begin(about, restart))
    damage = processes.on_first(store.discard_damaged)
    if damage:
        emit("damaged", {"note": damage})
    loop = _Loop(spec, decoder, store, layers, given, processes, _Clock(emit), emit)

    def attempt(sequences: int, keeping: bool) -> None:
        activations = elsewhere(decoder.device) if spec.activations == "auto" and not keeping else spec.activations
        dataclasses.replace(loop, spec=spec.replace(batch_tokens=sequences * seq_len, activations=activations)).run(own, keeping)

    def given_up(sequences: int, what_was_kept: bool) -> None:
        decoder.drop_all()
        how = "with nothing in it that can be computed again or wait elsewhere"
        if not what_was_kept:
            how = f"with {sequences} sequences to a forward"
            if processes.first:
                store.keep_batch(sequences)
        emit("memory", {"note": f"out of memory in the phase {loop.clock.phase!r}: going on {how}"})

    own = CalibrationTokens(processes.share(tokens.calibration), processes.share(tokens.heldout, last_first=True))
    seq_len = tokens.calibration.shape[1]
    start = processes.on_first(lambda: min(len(own.calibration), max(1, spec.batch_tokens // seq_len), store.kept_batch() or math.inf))
    with_less_memory(attempt, start, lambda: loop.clock.phase in FORWARDS, given_up, lambda: processes.together(again=is_out_of_memory))


def _refuse_differing(processes: Processes, about: dict[str, Any]) -> None:
    """Raises `ModelError` unless all processes say the same: they would solve layers of different models as if of one."""
    first, *others = processes.gather(about)
    for rank, other in enumerate(others, 1):
        if changed := differences(first, other):
            raise ModelError(
                f"process {rank} of {processes.size} would do another run than the first: {'; '.join(changed)}. Give every machine the "
                "same model, settings, versions and kind of device"
            )


@dataclass(frozen=True, eq=False)
class _Streams:
    """The activations on their way through the blocks, this process's own; each is replaced in place, block after block.

    reference, unseen: the original model's, of the calibration and of the held-out tokens, where the run corrects.
    """

    calibration: list[Batch]
    heldout: list[Batch]
    reference: Reference | None
    unseen: Reference | None

    @property
    def references(self) -> list[Reference]:
        return [reference for reference in (self.reference, self.unseen) if reference]


@dataclass(frozen=True, eq=False)
class _Block:
    """A block that is loaded. calibration, heldout: its forwards."""

    index: int
    linears: dict[str, nn.Module]
    calibration: Forwards
    heldout: Forwards

    def settle(self, names: Iterable[str]) -> None:
        self.calibration.settle(names)
        self.heldout.settle(names)


@dataclass(frozen=True, eq=False)
class _Loop:
    """What all blocks of a run have in common, and what is done with one of them. outputs: what those of a layer count, by its name."""

    spec: RunSpec
    decoder: Decoder
    store: Store
    layers: dict[str, LayerSpec]
    given: GivenBase | None
    processes: Processes
    clock: _Clock
    emit: Emit
    outputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def run(self, tokens: CalibrationTokens, keeping: bool = True) -> None:
        """From the first block that is not stored. tokens: this process's own. keeping: what is final in a block, as far as there is
        room."""
        decoder, clock = self.decoder, self.clock
        done = self.processes.on_first(self.store.finished)
        total = len(decoder.blocks)
        self.emit("start", {"blocks": total, "finished": done, "layers": sum(not layer.dense for layer in self.layers.values())})
        if done == total:
            return
        last = max(i for i in range(total) if any(not self.layers[name].dense for name in decoder.linears(i)))  # its output nobody needs
        loop = self._informed(tokens)
        with clock("embed"):
            streams = self._entered(tokens)
        kinds = Kinds(decoder, self.spec.corrects, self.processes.on_first)
        spare = spare_memory(decoder.device, self.processes.here) if keeping else 0
        for index in range(total):
            started = time.perf_counter()
            with clock("load"):
                decoder.load_block(index)
            with clock("capture"):
                block = loop._block(index, streams, kinds.of(index, streams.calibration), Room(spare))
            if index < done:
                stored = self.processes.exchange(self.store.read(index) if self.processes.first else {}, decoder.device)
                self._apply(stored, block)
                self.emit("replay", {"block": index, "blocks": total})
            else:
                results = loop._solve_block(block, streams)
                with clock("store"):
                    if self.processes.first:
                        self.store.write(index, results)
            if index < last:
                with clock("propagate"):
                    for forwards in (block.calibration, block.heldout, *streams.references):
                        forwards.propagate()
            del block
            decoder.drop_block(index)
            self.emit("block", {"block": index, "blocks": total, "seconds": time.perf_counter() - started, "replayed": index < done})

    def _informed(self, tokens: CalibrationTokens) -> _Loop:
        """The same with what the run asks for of the loss: what outputs count, and widths and ranks where they are spent best."""
        spec, decoder = self.spec, self.decoder
        if not spec.follows_back:
            return self
        with self.clock("gradients"):
            squared = squared_gradients_of(spec, decoder, self.layers, tokens.calibration, self.store, self.processes)
        layers = self.layers
        if spec.spends:
            with self.clock("survey"):
                layers = budgeted(spec, decoder, layers, tokens.calibration, squared, self.store, self.processes, self.given)
        outputs = output_weights(squared, spec.fisher) if spec.weighs_outputs else {}
        return dataclasses.replace(self, layers=layers, outputs=outputs)

    def _entered(self, tokens: CalibrationTokens) -> _Streams:
        """What the first block is given; of several processes some may have no tokens."""

        size = (2 if self.spec.corrects else 1) * (tokens.calibration.numel() + tokens.heldout.numel()) * self.decoder.bytes_of_a_token
        waiting = waiting_in(place_to_wait(self.spec, self.decoder.device, size, self.processes.here), self.store.folder)

        def enter(part: Tensor, first_alone: bool) -> list[Batch]:
            return self.decoder.enter(part, self.spec.batch_tokens, first_alone, waiting) if len(part) else []

        reference = Reference(self.decoder, enter(tokens.calibration, True)) if self.spec.corrects else None
        unseen = Reference(self.decoder, enter(tokens.heldout, False)) if self.spec.corrects and self.spec.calib.heldout_samples else None
        return _Streams(enter(tokens.calibration, True), enter(tokens.heldout, False), reference, unseen)

    def _block(self, index: int, streams: _Streams, kind: Kind, room: Room) -> _Block:
        linears, prefix = self.decoder.linears(index), self.decoder.block_name(index) + "."
        if self.spec.propagate == "dense":
            ends, final = kind.ends, linears
        else:
            ordered = {part: end for part, end in kind.ends.items() if not self.layers[prefix + end.layer].dense}
            ends, final = ordered if self.spec.one_by_one else {}, ()
        calibration, heldout = (Forwards(self.decoder, index, part, ends, room, final) for part in (streams.calibration, streams.heldout))
        for reference in streams.references:
            reference.enter(index, linears, kind, room)
        return _Block(index, linears, calibration, heldout)

    def _solve_block(self, block: _Block, streams: _Streams) -> dict[str, LayerResult]:
        """One forward per round; later rounds see the layers of earlier ones already quantized."""
        decoder, processes, linears = self.decoder, self.processes, block.linears
        wanted = {name: module for name, module in linears.items() if not self.layers[name].dense}
        if not wanted:
            return {}
        with self.clock("capture"):
            groups = groups_of(decoder, block.index, wanted, block.calibration, processes)
        results: dict[str, LayerResult] = {}
        for together in decoder.rounds(groups, self.spec.one_by_one):
            owner = shared_out(together, {name: linear_shape(linears[name]) for group in together for name in group}, processes.size)
            with self.clock("capture"):
                stats, drifts = statistics(decoder, linears, together, block.calibration, processes, streams.reference)
                stats |= top_up_experts(decoder, linears, block.calibration, stats, processes)
                unseen, unseen_drifts = {}, {}
                if self.spec.calib.heldout_samples:
                    unseen, unseen_drifts = statistics(decoder, linears, together, block.heldout, processes, streams.unseen)
            for group in together:
                seen, held = stats.pop(group[0]), unseen.pop(group[0], None)  # gone, with what was found from them, before the next ones
                own = [name for name in group if owner[name] == processes.rank]
                for name in own:
                    with self.clock("solve"):
                        weight = self.decoder.weight(name, linears[name])
                        if drift := drifts.pop(name, None):
                            weight = self._corrected(weight, seen, drift, held, unseen_drifts.pop(name, None))
                        results[name] = self._solve_layer(name, weight, seen.for_outputs(self.outputs.get(name)), held)
                    self._tell(block, name, results[name])
                del seen, held
                with self.clock("apply"):
                    self._apply({name: results[name] for name in own}, block)
            others = self._of_others({name: results[name] for name in owner if name in results})
            for name, result in others.items():
                self._tell(block, name, result)
            self._apply(others, block)
            results |= others
        return {name: results[name] for name in linears if name in results}

    def _corrected(
        self, weight: Tensor, seen: LayerStats, drift: Drift, unseen: LayerStats | None, unseen_drift: Drift | None
    ) -> Tensor:  # fmt: skip
        """The weight that the layer is asked for: as much of a correction as the run says, or as helps held-out tokens the most."""
        if self.spec.correction is not None:
            return corrected(weight, seen, drift, self.spec.correction)
        if unseen is None or unseen_drift is None:
            raise ValueError("a correction cannot be chosen without what held-out tokens say of it")
        return corrected_by_heldout(weight, seen, drift, unseen, unseen_drift)

    def _solve_layer(self, name: str, weight: Tensor, seen: LayerStats, unseen: LayerStats | None) -> LayerResult:
        return solve_layer(weight, seen, unseen, self.layers[name], self.spec.lora, self.given.weight(name) if self.given else None)

    def _of_others(self, own: dict[str, LayerResult]) -> dict[str, LayerResult]:
        """What other processes solved while this one solved its own."""
        if self.processes.size == 1:
            return {}
        with self.clock("exchange"):
            return {name: result for name, result in self.processes.exchange(own, self.decoder.device).items() if name not in own}

    def _tell(self, block: _Block, name: str, result: LayerResult) -> None:
        self.emit("layer", {"block": block.index, "name": name, **dataclasses.asdict(result.metrics)})

    def _apply(self, results: dict[str, LayerResult], block: _Block) -> None:
        """Puts finished layers into a block: `Q + BA` (`adapter`), `Q` (`quantized`), or nothing (`dense`)."""
        if self.spec.propagate == "dense":
            return
        for name, result in results.items():
            set_weight(block.linears[name], result.effective_weight(adapter=self.spec.propagate == "adapter"))
        block.settle(results)


class _Clock:
    """Times phases and emits each as it ends; on a GPU a phase ends when its kernels have."""

    def __init__(self, emit: Emit):
        self._emit = emit
        self.phase = ""

    def __call__(self, phase: str) -> _Clock:
        self.phase = phase
        return self

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._emit("phase", {"phase": self.phase, "seconds": time.perf_counter() - self._started})

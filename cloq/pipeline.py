"""The one loop: block after block, capture → quantize → factors → store → next block's inputs.

    run = Pipeline(spec, out)          opens the model and the store; nothing is computed yet
    run.execute(emit)                  the loop; every finished block is on disk before the next one starts

A killed run is executed again with the same settings: finished blocks are read back and only their forward is repeated, so the
activations, and with them every later byte, are the same as in an undisturbed run.

Of several processes each streams its own sequences through all blocks. Their Gram matrices are summed, the layers shared out, and everyone
gets all results; the first process alone reads and writes the store. See `cloq.distributed`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cloq import __version__, initializers, linalg, quantizers
from cloq.calibration import CalibrationTokens, gram_matrices, paired_statistics, shared_inputs, summed, topped_up
from cloq.distributed import ALONE, Processes, shared_out
from cloq.drift import Drift, corrected, sums_of
from cloq.errors import ModelError, SpecError
from cloq.memory import in_smaller_batches, is_out_of_memory
from cloq.models import Batch, Decoder, Reference, linear_shape, set_weight
from cloq.specs import LayerSpec, LoraSpec, RunSpec, layer_spec, matches, shown
from cloq.store import Store, differences
from cloq.types import AnyQuantizedWeight, LayerMetrics, LayerResult, LayerStats, LoraFactors, WeightLayout

Emit = Callable[[str, dict[str, Any]], None]
"""Receives what happens, as a name and plain values: `damaged`, `memory`, `start`, `replay`, `layer`, `block`, `phase`, `done`."""

EXECUTION_ONLY = ("device", "batch_tokens")
"""Settings that say how a run is executed, not what it computes; they may change between a run and its continuation."""

FORWARDS = ("embed", "capture", "propagate")
"""Phases whose memory grows with the micro-batch."""

SPECTRUM_POINTS = 32

ENOUGH = 2
"""Tokens for each input of an expert's layer with which its own Gram matrix is enough; measured in docs/log.md."""

SHOWN = 4
"""Tokens for each input that an expert with fewer is shown besides, or all there are."""


class GivenBase(Protocol):
    """A base that someone else quantized: its layers by full name, each read exactly as the file decodes."""

    names: frozenset[str]

    def weight(self, name: str) -> AnyQuantizedWeight: ...

    def fingerprint(self) -> str: ...


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
    clock = _Clock(emit)

    def attempt(sequences: int) -> None:
        _run_blocks(spec.replace(batch_tokens=sequences * seq_len), decoder, own, store, layers, clock, emit, given, processes)

    def shrunk(sequences: int) -> None:
        decoder.drop_all()
        if processes.first:
            store.keep_batch(sequences)
        emit("memory", {"note": f"out of memory in the phase {clock.phase!r}: going on with {sequences} sequences to a forward"})

    own = CalibrationTokens(processes.share(tokens.calibration), processes.share(tokens.heldout, last_first=True))
    seq_len = tokens.calibration.shape[1]
    start = processes.on_first(lambda: min(len(own.calibration), max(1, spec.batch_tokens // seq_len), store.kept_batch() or math.inf))
    in_smaller_batches(attempt, start, lambda: clock.phase in FORWARDS, shrunk, lambda: processes.together(again=is_out_of_memory))


def _refuse_differing(processes: Processes, about: dict[str, Any]) -> None:
    """Raises `ModelError` unless all processes say the same: they would solve layers of different models as if of one."""
    first, *others = processes.gather(about)
    for rank, other in enumerate(others, 1):
        if changed := differences(first, other):
            raise ModelError(
                f"process {rank} of {processes.size} would do another run than the first: {'; '.join(changed)}. Give every machine the "
                "same model, settings, versions and kind of device"
            )


def _run_blocks(
    spec: RunSpec, decoder: Decoder, tokens: CalibrationTokens, store: Store, layers: dict[str, LayerSpec], clock: _Clock, emit: Emit,
    given: GivenBase | None, processes: Processes,
) -> None:  # fmt: skip
    """The loop itself, from the first block that is not stored. tokens: this process's own."""
    done = processes.on_first(store.finished)
    total = len(decoder.blocks)
    last = max(i for i in range(total) if any(not layers[name].dense for name in decoder.linears(i)))  # behind it nobody needs activations
    emit("start", {"blocks": total, "finished": done, "layers": sum(not s.dense for s in layers.values())})
    with clock("embed"):
        calibration, heldout = (_entered(decoder, part, spec.batch_tokens) for part in (tokens.calibration, tokens.heldout))
        reference = None
        if spec.corrects:
            reference = Reference(decoder, _entered(decoder, tokens.calibration, spec.batch_tokens), processes.on_first)
    for index in range(total):
        started = time.perf_counter()
        with clock("load"):
            block = decoder.load_block(index)
        linears = decoder.linears(index)
        if reference:
            with clock("capture"):
                reference.enter(index, linears)
        if index < done:
            stored = processes.exchange(store.read(index) if processes.first else {}, decoder.device)
            apply_results(stored, linears, spec.propagate)
            emit("replay", {"block": index, "blocks": total})
        else:
            results = _solve_block(spec, decoder, index, linears, layers, calibration, heldout, reference, clock, emit, given, processes)
            with clock("store"):
                if processes.first:
                    store.write(index, results)
        if index < last:
            with clock("propagate"):
                for batches in (calibration, heldout):
                    for i, batch in enumerate(batches):  # in place: old and new activations of all batches never stand side by side
                        batches[i] = Batch(decoder.run_block(index, batch), batch.calls)
                if reference:
                    reference.propagate()
        decoder.drop_block(index)
        del block
        emit("block", {"block": index, "blocks": total, "seconds": time.perf_counter() - started, "replayed": index < done})


def _entered(decoder: Decoder, tokens: Tensor, batch_tokens: int) -> list[Batch]:
    """What the first block is given; of several processes some may have no tokens."""
    return decoder.enter(tokens, batch_tokens) if len(tokens) else []


def _solve_block(
    spec: RunSpec, decoder: Decoder, index: int, linears: dict[str, nn.Module], layers: dict[str, LayerSpec],
    calibration: list[Batch], heldout: list[Batch], reference: Reference | None, clock: _Clock, emit: Emit, given: GivenBase | None,
    processes: Processes,
) -> dict[str, LayerResult]:  # fmt: skip
    wanted = {name: module for name, module in linears.items() if not layers[name].dense}
    if not wanted:
        return {}
    with clock("capture"):
        groups = processes.on_first(lambda: shared_inputs(lambda: decoder.run_block(index, calibration[0]), wanted))
        if reference:
            reference.look(groups)
    rounds = decoder.rounds(groups, one_by_one=spec.sequential and spec.propagate != "dense")
    results: dict[str, LayerResult] = {}
    for together in rounds:  # one forward per round; later rounds see the layers of earlier ones already quantized
        owner = shared_out(together, {name: linear_shape(linears[name]) for group in together for name in group}, processes.size)
        with clock("capture"):
            stats, drifts = _statistics(decoder, index, linears, together, calibration, processes, reference)
            stats |= _topped_up(decoder, index, linears, calibration, stats, processes)
            unseen, _ = _statistics(decoder, index, linears, together, heldout, processes) if spec.calib.heldout_samples else ({}, {})
        for group in together:
            seen, held = stats.pop(group[0]), unseen.pop(group[0], None)  # gone, with what was found from them, before the next ones
            own = [name for name in group if owner[name] == processes.rank]
            for name in own:
                weight = decoder.weight(name, linears[name])
                base = given.weight(name) if given else None
                with clock("solve"):
                    if name in drifts:
                        weight = corrected(weight, seen, drifts.pop(name), spec.correction)
                    results[name] = solve_layer(weight, seen, held, layers[name], spec.lora, base)
                emit("layer", {"block": index, "name": name, **dataclasses.asdict(results[name].metrics)})
            del seen, held
            with clock("apply"):
                apply_results({name: results[name] for name in own}, linears, spec.propagate)
        others = _of_others({name: results[name] for name in owner if name in results}, decoder, clock, processes)
        for name, result in others.items():
            emit("layer", {"block": index, "name": name, **dataclasses.asdict(result.metrics)})
        apply_results(others, linears, spec.propagate)
        results |= others
    return {name: results[name] for name in linears if name in results}


def _statistics(
    decoder: Decoder, index: int, linears: dict[str, nn.Module], groups: list[list[str]], batches: list[Batch], processes: Processes,
    reference: Reference | None = None,
) -> tuple[dict[str, LayerStats], dict[str, Drift]]:  # fmt: skip
    """Gram matrices of each group's input over the batches of all processes and, beside a reference, the drift of every layer."""
    if reference is None:
        own, drifts = gram_matrices(_forwards(decoder, index, batches), linears, [group[0] for group in groups]), {}
    else:
        pairs = zip(_forwards(decoder, index, batches), (partial(reference.seen, i) for i in range(len(batches))), strict=True)
        own, drifts = paired_statistics(pairs, linears, groups, reference.joined, decoder.expert_layers)
    if processes.size > 1:
        own = summed(own, processes.total, processes.add)
        processes.add(sums_of(drifts))
    return own, drifts


def _of_others(own: dict[str, LayerResult], decoder: Decoder, clock: _Clock, processes: Processes) -> dict[str, LayerResult]:
    """What other processes solved while this one solved its own."""
    if processes.size == 1:
        return {}
    with clock("exchange"):
        return {name: result for name, result in processes.exchange(own, decoder.device).items() if name not in own}


def _topped_up(
    decoder: Decoder, index: int, linears: dict[str, nn.Module], batches: list[Batch], stats: dict[str, LayerStats],
    processes: Processes = ALONE,
) -> dict[str, LayerStats]:  # fmt: skip
    """The statistics of those experts' layers that saw fewer than `ENOUGH` tokens for each of their inputs: topped up to that many with a
    mean over tokens of the layer, wherever the router sent them, as this expert would treat them."""
    least = {name: ENOUGH * linear_shape(linears[name])[1] for name in stats}
    starved = [n for n, seen in stats.items() if n in decoder.expert_layers and seen.n_tokens < least[n]]
    if not starved:
        return {}
    alike: dict[object, list[str]] = {}  # experts are shown the same tokens, so of those that see the tokens themselves one stands for all
    for name in starved:
        layer = decoder.expert_layers[name]
        alike.setdefault(name if layer.inner else layer.experts, []).append(name)
    tokens = processes.total({"tokens": sum(batch.hidden.shape[:2].numel() for batch in batches)})["tokens"]
    with decoder.showing(starved, tokens, SHOWN // ENOUGH * max(least[name] for name in starved)):
        others, _ = _statistics(decoder, index, linears, [names[:1] for names in alike.values()], batches, processes)
    return {name: topped_up(stats[name], others[names[0]], least[name]) for names in alike.values() for name in names}


def solve_layer(
    weight: Tensor, stats: LayerStats, unseen: LayerStats | None, layer: LayerSpec, lora: LoraSpec, given: AnyQuantizedWeight | None = None
) -> LayerResult:  # fmt: skip
    """Quantizes one layer, fits its factors, and measures both. Pure: tensors in, a value out.

    weight: `(out, in)` float32. stats, unseen: of the calibration and the held-out tokens. given: the quantized weight, where it is fixed.
    """
    started = time.perf_counter()
    notes = []
    rank = min(layer.rank, *weight.shape)
    if rank < layer.rank:
        notes.append(f"rank {layer.rank} clipped to {rank}, the most that {tuple(weight.shape)} allows")
    group_size = layer.quant.group_size
    if group_size is not None and weight.shape[1] % group_size:
        notes.append(f"group size {group_size} does not divide {weight.shape[1]} inputs: the last group has {weight.shape[1] % group_size}")
    if stats.borrowed:
        notes.append(
            f"fewer than {stats.n_tokens + stats.borrowed} calibration tokens reached this expert: topped up with a mean over tokens that "
            "went to others"
        )
    elif stats.n_tokens == 0:
        notes.append("no calibration token reached this layer: quantized without statistics, factors fitted to the plain weight error")
        stats = LayerStats(torch.eye(weight.shape[1], device=weight.device), 0)
    unseen = unseen if unseen and unseen.n_tokens else None
    quantizer = quantizers.from_spec(layer.quant)
    initializer = initializers.from_spec(lora.replace(rounds=0) if given else lora)  # codes that are given are not chosen again
    quantized, factors = initializer.initialize(weight, stats, lambda w, s: given or quantizer.quantize(w, s), rank)
    if quantized.damping > layer.quant.damping:
        notes.append(f"Cholesky failed with damping {layer.quant.damping:g}; raised to {quantized.damping:g}")
    seconds = time.perf_counter() - started
    residual = weight - quantized.dequantize()
    corrected = residual - factors.delta()
    if not bool(torch.isfinite(corrected).all()):
        raise ModelError(f"a layer of shape {tuple(weight.shape)} came out of quantization with NaN or Inf")
    before, after, total = _errors(weight, residual, corrected, stats.gram)
    heldout = _errors(weight, residual, corrected, unseen.gram) if unseen else (None, None)
    return LayerResult(
        quantized,
        factors,
        LayerMetrics(
            error_quantized=before,
            error_corrected=after,
            heldout_quantized=heldout[0],
            heldout_corrected=heldout[1],
            n_tokens=stats.n_tokens,
            damping=quantized.damping,
            seconds=seconds,
            rank=rank,
            bits_per_weight=quantized.storage_bits() / weight.numel(),
            spectrum=_spectrum(factors, stats.gram, total),
            notes=tuple(notes),
        ),
    )


def _errors(weight: Tensor, residual: Tensor, corrected: Tensor, gram: Tensor) -> tuple[float, float, float]:
    """Relative errors of `Q` and of `Q + B A`, and `‖(W − Q) S‖²`, from one norm of each matrix."""
    whole, before, after = (linalg.gram_norm2(matrix, gram) for matrix in (weight, residual, corrected))
    return linalg.share(before, whole), linalg.share(after, whole), before


def _spectrum(factors: LoraFactors, gram: Tensor, total: float) -> tuple[float, ...]:
    """Up to 32 of the eigenvalues of `(B A) G (B A)ᵀ`, as shares of `‖E S‖²`: how much of the error how few directions take away."""
    if total <= 0:
        return ()
    core = torch.linalg.qr(factors.B).R @ factors.A
    values = torch.linalg.eigvalsh((core @ gram @ core.T).double()).flip(0).clamp_min(0)
    at = sorted({math.floor(i * (len(values) - 1) / (SPECTRUM_POINTS - 1)) for i in range(SPECTRUM_POINTS)})
    return tuple(float(v) / total for v in values[at])


def _forwards(decoder: Decoder, index: int, batches: list[Batch]):
    return (lambda batch=batch: decoder.run_block(index, batch) for batch in batches)


def apply_results(results: dict[str, LayerResult], linears: dict[str, nn.Module], propagate: str) -> None:
    """Puts finished layers into a block: `Q + BA` (`adapter`), `Q` (`quantized`), or nothing (`dense`)."""
    if propagate == "dense":
        return
    for name, result in results.items():
        set_weight(linears[name], result.effective_weight(adapter=propagate == "adapter"))


def plan_layers(spec: RunSpec, decoder: Decoder) -> dict[str, LayerSpec]:
    """What every linear layer of every block gets, by full name, in order.

    Raises `SpecError` if a pattern names no layer or nothing is left to quantize; `ModelError` for experts that cannot be taken apart,
    unless `only` or `skip` say that this is known.
    """
    names = decoder.all_linears()
    fused = [name for index in range(len(decoder.blocks)) for name in decoder.fused_experts(index)]
    if fused and not (spec.only or spec.skip):
        raise ModelError(
            f"{type(decoder.model).__name__} fuses its experts into parameters such as {fused[0]}, and does not say how they "
            "lie there, so cloq cannot quantize them. Quantize the dense part alone with --only, for example --only 'self_attn.*'"
        )
    for pattern in [*spec.only, *spec.skip, *(rule.match for rule in spec.rules)]:
        if not any(matches(pattern, name) for name in names):
            raise SpecError(f"the pattern {pattern!r} matches no linear layer; layers are named like {names[0]}")
    layers = {name: layer_spec(spec, name) for name in names}
    if all(layer.dense for layer in layers.values()):
        raise SpecError("--only, --skip and the rules leave no layer to quantize")
    return layers


def predicted_layouts(layers: dict[str, LayerSpec], decoder: Decoder) -> dict[str, WeightLayout]:
    """The layouts that the layers will have, so that a format can refuse them before the work instead of after it."""
    found = {}
    for index in range(len(decoder.blocks)):
        for name, module in decoder.linears(index).items():
            if not layers[name].dense:
                quant = layers[name].quant
                permuted = quant.quantizer == "gptq" and quant.act_order and not quant.static_groups and quant.group_size is not None
                kind = "codebook" if quant.quantizer == "nf4" else "integer"
                found[name] = WeightLayout(kind, linear_shape(module), quant.bits, quant.group_size, quant.symmetric, permuted)
    return found


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


def resolve_device(name: str) -> str:
    """`auto` → `cuda` where there is one, else `cpu`; a GPU that was asked for and is not there is a `SpecError`."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind, number = torch.device(name).type, torch.device(name).index or 0
    except RuntimeError as error:
        raise SpecError(f"device is {shown(name)}; allowed: auto, cpu, cuda, cuda:1, mps") from error
    available = {"cpu": True, "cuda": number < torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
    if not available.get(kind, False):
        have = ", ".join(k for k, ok in available.items() if ok)
        raise SpecError(f"device {name!r} is not available here (there is: {have}); use --device auto, or install the torch build for it")
    return name

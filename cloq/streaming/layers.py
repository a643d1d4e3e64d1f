"""Which layers a run quantizes, and how each of them."""

from __future__ import annotations

import math

from cloq.errors import ModelError, SpecError
from cloq.models import Decoder, linear_shape
from cloq.specs import LayerSpec, RunSpec, layer_spec, matches, mixes
from cloq.types import WeightLayout


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


def foreseen(spec: RunSpec, layers: dict[str, LayerSpec], decoder: Decoder) -> dict[str, LayerSpec]:
    """The layers of a run whose mean width is still to be spent, as if it were spent on layers of 2 bits and of 4 in turn: of the right
    size altogether, and of several widths. Other runs' layers are as they are."""
    found, weights, spent = dict(layers), 0, 0
    for name, layer in layers.items():
        if not layer.dense and mixes(spec, name):
            size = math.prod(linear_shape(decoder.model.get_submodule(name)))
            weights += size
            width = 4 if spec.mean_bits * weights - spent >= 3 * size else 2
            spent += width * size
            found[name] = layer.replace(quant=layer.quant.replace(bits=width))
    return found


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

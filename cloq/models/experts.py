"""Experts that transformers keeps in one parameter, taken apart: every expert's matrix becomes a linear layer with a name.

    …mlp.experts.gate_up_proj (experts, 2 · inner, width)  →  …mlp.experts.3.gate_proj, …mlp.experts.3.up_proj
    …mlp.experts.down_proj    (experts, width, inner)      →  …mlp.experts.3.down_proj

Hooks then see each expert's tokens, and all that works on linear layers (patterns, Gram matrices, quantizers, factors, stored blocks)
works on experts. No family has a branch: transformers' experts classes state how they lie in memory and what their gate computes, for the
sake of its own interchangeable kernels (`transformers.integrations.moe`), and what they state is what is read here. Classes without such
statements stay as they are; see `cloq.linears.fused_experts`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

_STATED = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
"""What transformers' decorator for experts classes sets on every instance."""

Part = Callable[[int], slice]
"""How many outputs a parameter has → which of them are a layer's."""


def _first(outputs: int) -> slice:
    return slice(outputs // 2)


def _second(outputs: int) -> slice:
    return slice(outputs // 2, None)


def _even(outputs: int) -> slice:
    return slice(0, None, 2)


def _odd(outputs: int) -> slice:
    return slice(1, None, 2)


def _all(outputs: int) -> slice:
    return slice(None)


_LAYOUTS: dict[str, dict[str, tuple[str, Part]]] = {
    "concatenated": {"gate_proj": ("gate_up_proj", _first), "up_proj": ("gate_up_proj", _second), "down_proj": ("down_proj", _all)},
    "interleaved": {"gate_proj": ("gate_up_proj", _even), "up_proj": ("gate_up_proj", _odd), "down_proj": ("down_proj", _all)},
    "plain": {"up_proj": ("up_proj", _all), "down_proj": ("down_proj", _all)},
}
"""Layout → an expert's layers → (the parameter that holds them for all experts, which of its outputs)."""

PARTS_IN_ORDER = (_first, _second)
"""Of a parameter that is two layers' outputs one after the other."""


class ExpertLayer(NamedTuple):
    """Where an expert's layer stands. experts: full name of the experts that it is one of. index: of the expert. inner: it is given what
    the expert's other layers made, not the tokens."""

    experts: str
    index: int
    inner: bool


@dataclass(frozen=True)
class Slot:
    """One expert's layer in the parameter of all experts. part: which of the outputs. transposed: stored `(experts, in, out)`."""

    leaf: str
    part: Part
    expert: int
    transposed: bool

    def of(self, fused: Tensor) -> Tensor:
        """The layer's weight `(out, in)`, or bias `(out,)`, as a view of the parameter for all experts (or their biases)."""
        own = fused[self.expert]
        own = own.T if own.ndim == 2 and self.transposed else own
        return own[self.part(own.shape[0])]


class Expert(nn.Module):
    """One expert: `down(gate_rule(gate(x), up(x)))`, or `down(act(up(x)))` where there is no gate. rule: the module that it was taken out
    of, which knows the activation and the gate's rule; its parameters are gone."""

    def __init__(self, layers: list[str], rule: nn.Module, interleaved: bool):
        super().__init__()
        for name in layers:
            setattr(self, name, nn.utils.skip_init(nn.Linear, 1, 1, bias=rule.has_bias, device="meta"))  # of a shape that comes later
        self._interleaved = interleaved
        self.__dict__["_rule"] = rule  # not a part of this module: it would be visited once for every expert

    def forward(self, x: Tensor) -> Tensor:
        if "gate_proj" not in self._modules:
            return self.down_proj(self._rule.act_fn(self.up_proj(x)))
        gate, up = self.gate_proj(x), self.up_proj(x)
        joined = torch.stack([gate, up], dim=-1).flatten(-2) if self._interleaved else torch.cat([gate, up], dim=-1)
        return self.down_proj(self._rule._apply_gate(joined))


class Experts(nn.ModuleList):
    """Stands in the place of a module with fused experts and computes the same, expert after expert.

    slots: by the name of a layer inside of this module (`3.up_proj`), where it lies in the fused parameters. shapes: of those, by leaf.
    """

    def __init__(self, fused: nn.Module):
        layout = _LAYOUTS["plain" if not fused.has_gate else "concatenated" if fused.is_concatenated else "interleaved"]
        held = dict(fused.named_parameters(recurse=False))
        fused._parameters.clear()
        count = len(held["down_proj"])
        slots = {f"{i}.{name}": Slot(leaf, part, i, fused.is_transposed) for i in range(count) for name, (leaf, part) in layout.items()}
        super().__init__(Expert(list(layout), fused, layout["up_proj"][1] is _odd) for _ in range(count))
        for name, slot in slots.items():
            _take(self.get_submodule(name), slot, held)
        self.num_experts, self.slots = count, slots
        self.shapes = {leaf: tuple(parameter.shape) for leaf, parameter in held.items()}
        self._shown: tuple[frozenset[int], int] | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`Σ weight · expert(x)` over the experts that the router chose for each token. hidden_states: `(tokens, width)`; top_k_index,
        top_k_weights: `(tokens, k)`. An index that is no expert's is passed over."""
        out = torch.zeros_like(hidden_states)
        if self._shown is not None:
            for index in sorted(self._shown[0]):
                self[index](hidden_states[:: self._shown[1]].clone())
            return out
        for index, expert in enumerate(self):
            tokens, choice = self.tokens_of(index, top_k_index)
            if len(tokens):
                made = expert(hidden_states[tokens]) * top_k_weights[tokens, choice, None]
                out.index_add_(0, tokens, made.to(out.dtype))
        return out

    def tokens_of(self, index: int, top_k_index: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens an expert gets, and as which of their choices."""
        return torch.where(top_k_index == index)

    @contextlib.contextmanager
    def showing(self, experts: frozenset[int], every: int) -> Iterator[None]:
        """Inside, these experts are given every so-manieth token whatever the router says, all others none, and what comes out means
        nothing: for looking at what they make of tokens that are not theirs."""
        self._shown = (experts, every)
        try:
            yield
        finally:
            self._shown = None


def _take(layer: nn.Linear, slot: Slot, held: dict[str, nn.Parameter]) -> None:
    """Gives a layer its own copy of what is its part of the fused parameters, or as little as they hold themselves (on the meta device)."""
    for kind, leaf in (("weight", slot.leaf), ("bias", f"{slot.leaf}_bias")):
        if leaf in held:
            own = slot.of(held[leaf].detach()).clone(memory_format=torch.contiguous_format)
            setattr(layer, kind, nn.Parameter(own, requires_grad=held[leaf].requires_grad))
    layer.out_features, layer.in_features = layer.weight.shape


def unfuse(model: nn.Module) -> nn.Module:
    """Takes apart all fused experts that say how they lie in memory; the model itself, changed in place. Weights that it holds go with
    them."""
    for name, module in list(model.named_modules()):
        if _says_how_it_lies(module):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, Experts(module))
    return model


def _says_how_it_lies(module: nn.Module) -> bool:
    """Nothing but the parameters of one of the layouts, with three dimensions, and their biases."""
    if not all(flag in vars(module) for flag in _STATED) or module.has_post_expert_norm:
        return False
    leaves = {"gate_up_proj" if module.has_gate else "up_proj", "down_proj"}
    found = {name: parameter.ndim for name, parameter in module.named_parameters()}
    return found == dict.fromkeys(leaves, 3) | (dict.fromkeys((f"{leaf}_bias" for leaf in leaves), 2) if module.has_bias else {})


def experts_of(module: nn.Module, prefix: str = "") -> dict[str, Experts]:
    """All experts that were taken apart, by full name."""
    return {name: part for name, part in module.named_modules(prefix=prefix) if isinstance(part, Experts)}


def fuse(experts: Experts, get: Callable[[str, str], Tensor]) -> dict[str, Tensor]:
    """The parameters that the experts were taken out of, by leaf. get: the tensor of a layer inside of `experts` by the layer's name and
    what of it (`weight`, `bias`), in the dtype that the result shall have. The inverse of the slots."""
    made: dict[str, Tensor] = {}
    for name, slot in experts.slots.items():
        for kind, leaf in (("weight", slot.leaf), ("bias", f"{slot.leaf}_bias")):
            if leaf in experts.shapes:
                value = get(name, kind)
                if leaf not in made:
                    made[leaf] = torch.empty(experts.shapes[leaf], dtype=value.dtype, device=value.device)
                slot.of(made[leaf]).copy_(value)
    return made


def rounds(groups: list[list[str]], place: Callable[[str], ExpertLayer | None]) -> list[list[list[str]]]:
    """Layers to be calibrated in one forward each, as groups that share an input.

    groups: of layers that were seen to share an input, in the order in which a forward reaches them. A group outside of experts is a round
    of its own. All experts side by side are two rounds, whichever of them the forward reached: first the layers that are given the tokens,
    grouped by expert, then those that are given what the first ones made.
    """
    found: dict[tuple, dict[tuple, list[str]]] = {}
    for group in groups:
        for name in group:
            at = place(name)
            found.setdefault((at.experts, at.inner) if at else tuple(group), {}).setdefault(at or tuple(group), []).append(name)
    return [list(together.values()) for together in found.values()]

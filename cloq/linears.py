"""What in a block is a linear layer, what is a fused expert, what is a router: decided by what a module does, never by its
name.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear layer whose weight is stored `(in, out)`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """`nn.Linear`, transformers' Conv1D, and subclasses of `nn.Linear` whose forward is still `W x + b` (Falcon's, but no
    expert router)."""
    return is_conv1d(module) or (isinstance(module, nn.Linear) and _computes_linear(type(module)))


@functools.cache
def _computes_linear(kind: type[nn.Linear]) -> bool:
    if kind.forward is nn.Linear.forward:
        return True
    plain = nn.utils.skip_init(nn.Linear, 3, 2)
    x = torch.tensor([[0.5, -1.0, 2.0], [1.0, 3.0, -0.25]])
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([[1.0, 2.0, 4.0], [-3.0, 0.5, 1.0]]))
        plain.bias.copy_(torch.tensor([0.25, -0.75]))
        try:
            output = kind.forward(plain, x)
        except Exception:  # a forward that needs more than a weight and a bias is something else than a linear layer
            return False
        return isinstance(output, Tensor) and output.shape == (2, 2) and torch.allclose(output, plain(x))


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """`(out, in)` of a linear layer, whatever way round it stores its weight; no weight is needed."""
    rows, columns = module.weight.shape
    return (columns, rows) if is_conv1d(module) else (rows, columns)


def weight_of(module: nn.Module) -> Tensor:
    """A linear layer's weight as `(out, in)`, in the layer's dtype, whatever way round it is stored."""
    return module.weight.T if is_conv1d(module) else module.weight


def set_weight(module: nn.Module, weight: Tensor) -> None:
    """Puts an `(out, in)` weight into a linear layer, in the layer's dtype and way round. Raises `ValueError` for another
    shape."""
    if tuple(weight.shape) != linear_shape(module):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} does not fit a linear layer of shape {linear_shape(module)} (out, in)")
    current = module.weight
    value = weight.T if is_conv1d(module) else weight
    module.weight = nn.Parameter(value.to(current.device, current.dtype).contiguous(), requires_grad=False)


_FUSED_SHARE, _FUSED_LEAST = 0.1, 0.01


def fused_experts(block: nn.Module) -> list[str]:
    """Names, inside the block, of weights that hold much of it and belong to no linear layer: experts fused into one parameter that could
    not be taken apart (see `cloq.models.experts`), which hooks on modules do not see.

    Weights are parameters of two or more dimensions outside linear layers, convolutions and embeddings. Together they must be a
    tenth of the block, each a hundredth: the small ones of recurrent layers, decays and routers stay dense like norms do, and
    are not meant."""
    held = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
    loose = {
        f"{path}.{leaf}".lstrip("."): parameter.numel()
        for path, module in block.named_modules()
        if not isinstance(module, held) and not is_conv1d(module)
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.squeeze().ndim > 1
    }
    total = sum(p.numel() for p in block.parameters())
    loose = {name: size for name, size in loose.items() if size >= _FUSED_LEAST * total}
    return list(loose) if sum(loose.values()) >= _FUSED_SHARE * total else []


def routers(block: nn.Module) -> list[str]:
    """Names, inside the block, of plain linear layers that choose or weigh experts.

    The rule: within the module that holds the experts (fused, or a list of modules) but outside the experts themselves, a
    linear layer with as many outputs as there are experts, or with a single one. They are a ten-thousandth of the weights and
    decide where every token goes, so they stay as they are."""
    found = []
    for owner, experts, count in _expert_groups(block):
        inside = block.get_submodule(owner)
        for path, module in inside.named_modules(prefix=owner):
            within = path == experts or path.startswith(f"{experts}.")
            if not within and is_linear(module) and linear_shape(module)[0] in (1, count):
                found.append(path)
    return list(dict.fromkeys(found))


def _expert_groups(block: nn.Module) -> list[tuple[str, str, int]]:
    """(module that holds the experts, the experts, how many they are) for every set of experts in the block."""
    groups = []
    for name in fused_experts(block):
        weight, experts = block.get_parameter(name), name.rpartition(".")[0]
        if weight.ndim == 3:
            groups.append((experts.rpartition(".")[0], experts, weight.shape[0]))
    for path, module in block.named_modules():
        if isinstance(module, nn.ModuleList) and path.rpartition(".")[2] == "experts":
            groups.append((path.rpartition(".")[0], path, len(module)))
    return groups

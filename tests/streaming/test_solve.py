"""One layer, from its settings to its codes and factors."""

import pytest
import torch

from cloq import quantizers
from cloq.initializers import Cloq
from cloq.specs import layer_spec, run_spec
from cloq.streaming.solve import solve_layer
from tests.problems import LARGE_SHAPES, problem


@pytest.mark.parametrize("bits", [2, 3])
def test_the_initializer_knows_the_layers_width(bits):
    p = problem("power law", LARGE_SHAPES["wide"])
    run = run_spec(bits=bits, group_size=32, rank=4, effort="fast")
    layer = layer_spec(run, "layer")
    found = solve_layer(p.weight, p.stats, None, layer, run.lora)
    quantizer = quantizers.from_spec(layer.quant)
    knowing, not_knowing = (Cloq("balanced", 1, known).initialize(p.weight, p.stats, quantizer.quantize, 4)[0] for known in (bits, None))
    assert torch.equal(found.weight.codes, knowing.codes)
    assert torch.equal(knowing.codes, not_knowing.codes) == (bits != 2)

"""Weight → codes on a grid. One algorithm per file: a frozen dataclass with one verb, `quantize(weight, stats)`."""

from cloq.quantizers.descent import descend
from cloq.quantizers.gptq import Gptq
from cloq.quantizers.magr import Magr
from cloq.quantizers.nf4 import Nf4
from cloq.quantizers.rtn import Rtn
from cloq.specs import QuantSpec
from cloq.types import Quantizer

QUANTIZERS = {"gptq": Gptq, "rtn": Rtn, "nf4": Nf4}
"""The quantizers that a run can name. `Magr` wraps any of them."""


def from_spec(spec: QuantSpec) -> Quantizer:
    """The quantizer that a `QuantSpec` describes: each class takes those of its fields that the spec has."""
    kind = QUANTIZERS[spec.quantizer]
    quantizer = kind(**{name: getattr(spec, name) for name in kind.__dataclass_fields__ if hasattr(spec, name)})
    if not spec.magr:
        return quantizer
    alpha = spec.magr_alpha or (1e-3 if spec.group_size is None else 1e-4)
    return Magr(quantizer, spec.group_size, alpha)


__all__ = ["QUANTIZERS", "Gptq", "Magr", "Nf4", "Rtn", "descend", "from_spec"]

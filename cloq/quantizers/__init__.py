"""Weight → codes on a grid. One algorithm per file; a quantizer is a frozen dataclass with one verb, `quantize(weight, stats)`."""

from cloq.quantizers.gptq import Gptq
from cloq.quantizers.magr import Magr
from cloq.quantizers.rtn import Rtn

QUANTIZERS = {"gptq": Gptq, "rtn": Rtn}
"""The quantizers that a run can name. `Magr` wraps any of them."""

__all__ = ["QUANTIZERS", "Gptq", "Magr", "Rtn"]

"""(weight, stats, quantize, rank) → quantized weight + LoRA factors.

One algorithm per file, each a frozen dataclass with one verb.
"""

from cloq.initializers.cloq import SPLITS, Cloq, ClosedForm, closed_form
from cloq.initializers.eora import Eora
from cloq.initializers.loftq import Loftq
from cloq.initializers.pissa import Pissa
from cloq.initializers.qera import Qera
from cloq.initializers.svd import Svd
from cloq.initializers.zero import Zero
from cloq.specs import LoraSpec
from cloq.types import Initializer

INITIALIZERS = {"cloq": Cloq, "zero": Zero, "svd": Svd, "loftq": Loftq, "qera": Qera, "eora": Eora, "pissa": Pissa}
"""The initializers that a run can name."""


def from_spec(spec: LoraSpec) -> Initializer:
    """The initializer that a `LoraSpec` describes: each class takes those of its fields that the spec has."""
    kind = INITIALIZERS[spec.init]
    return kind(**{name: getattr(spec, name) for name in kind.__dataclass_fields__ if hasattr(spec, name)})


__all__ = [
    "INITIALIZERS",
    "SPLITS",
    "Cloq",
    "ClosedForm",
    "Eora",
    "Loftq",
    "Pissa",
    "Qera",
    "Svd",
    "Zero",
    "closed_form",
    "from_spec",
]

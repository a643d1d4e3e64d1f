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


def from_spec(spec: LoraSpec, bits: int | None = None) -> Initializer:
    """The initializer that a `LoraSpec` describes, for codes of `bits`: each class takes what it has fields for."""
    kind = INITIALIZERS[spec.init]
    known = {**vars(spec), "bits": bits}
    return kind(**{name: known[name] for name in kind.__dataclass_fields__ if name in known})


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

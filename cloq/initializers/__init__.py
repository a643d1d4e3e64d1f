"""(weight, stats, quantize, rank) → quantized weight + LoRA factors. One algorithm per file, each a frozen dataclass with one verb."""

from cloq.initializers.cloq import SPLITS, ClosedForm, Cloq, closed_form
from cloq.initializers.zero import Zero
from cloq.specs import LoraSpec
from cloq.types import Initializer

INITIALIZERS = {"cloq": Cloq, "zero": Zero}
"""The initializers that a run can name."""


def from_spec(spec: LoraSpec) -> Initializer:
    """The initializer that a `LoraSpec` describes: each class takes those of its fields that the spec has."""
    kind = INITIALIZERS[spec.init]
    return kind(**{name: getattr(spec, name) for name in kind.__dataclass_fields__ if hasattr(spec, name)})


__all__ = ["INITIALIZERS", "SPLITS", "ClosedForm", "Cloq", "Zero", "closed_form", "from_spec"]

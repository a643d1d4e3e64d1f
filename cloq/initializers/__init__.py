"""(weight, stats, quantize, rank) → quantized weight + LoRA factors. One algorithm per file, each a frozen dataclass with one verb."""

from cloq.initializers.cloq import SPLITS, ClosedForm, Cloq, closed_form
from cloq.initializers.zero import Zero

INITIALIZERS = {"cloq": Cloq, "zero": Zero}
"""The initializers that a run can name."""

__all__ = ["INITIALIZERS", "SPLITS", "ClosedForm", "Cloq", "Zero", "closed_form"]

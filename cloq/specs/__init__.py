"""What the user asked for: frozen values, validated on construction, with an exact round trip through JSON and YAML.

Nothing here imports torch, so the command line can validate before it loads anything heavy. Unknown keys are refused by name.
"""

from cloq.specs.checked import Spec, one_of, require, require_seed, shown, union_members
from cloq.specs.flat import EFFORTS, FLAT, run_spec
from cloq.specs.run import (
    ACTIVATIONS,
    BITS,
    DEFAULT_MODEL,
    GROUP_SIZES,
    INITIALIZER_NAMES,
    INITIALIZER_SETTINGS,
    PROPAGATE,
    QUANTIZER_NAMES,
    QUANTIZER_SETTINGS,
    SPLIT_NAMES,
    CalibSpec,
    LayerSpec,
    LoraSpec,
    QuantSpec,
    Rule,
    RunSpec,
    layer_spec,
    matches,
    mixes,
    ruled,
)

__all__ = [
    "ACTIVATIONS",
    "BITS",
    "DEFAULT_MODEL",
    "EFFORTS",
    "FLAT",
    "GROUP_SIZES",
    "INITIALIZER_NAMES",
    "INITIALIZER_SETTINGS",
    "PROPAGATE",
    "QUANTIZER_NAMES",
    "QUANTIZER_SETTINGS",
    "SPLIT_NAMES",
    "CalibSpec",
    "LayerSpec",
    "LoraSpec",
    "QuantSpec",
    "Rule",
    "RunSpec",
    "Spec",
    "layer_spec",
    "matches",
    "mixes",
    "one_of",
    "require",
    "require_seed",
    "ruled",
    "run_spec",
    "shown",
    "union_members",
]

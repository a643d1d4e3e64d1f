"""Settings by one flat list of names, as the command line and the Python API have them."""

from __future__ import annotations

import dataclasses
from typing import Any

from cloq.specs.checked import named, one_of, plain, require
from cloq.specs.run import INITIALIZER_SETTINGS, RUN_SETTINGS, QuantSpec, RunSpec

EFFORTS: dict[str, dict[str, Any]] = {
    "published": {"split": "paper", "rounds": 0, "correction": 0.0, "fisher": 0.0, "adaptive_rank": False},
    "fast": {"rounds": 1, "correction": 0.0, "fisher": 0.0, "adaptive_rank": False},
    "default": {},
    "best": {"rounds": 16, "fisher": RunSpec.fisher, "adaptive_rank": True},
}
"""What a run may cost → flat settings in place of the defaults; `published` is CLoQ as its authors have it. docs/results.md has what each
of them buys."""


FLAT = {
    **{
        name: ("", name)
        for name in (
            *("model", "revision", "quantized", "propagate", "sequential", "correction", "fisher", "mean_bits", "adaptive_rank"),
            *("device", "batch_tokens", "activations", "trust_remote_code"),
        )
    },
    **{name: ("", name) for name in ("only", "skip", "rules")},
    **{f.name: ("quant", f.name) for f in dataclasses.fields(QuantSpec)},
    **{name: ("lora", name) for name in ("init", "rank", "split", "rounds")},
    "loftq_iterations": ("lora", "iterations"),
    "calib": ("calib", "source"),
    "calib_samples": ("calib", "samples"),
    "calib_column": ("calib", "column"),
    **{name: ("calib", name) for name in ("seq_len", "heldout", "seed")},
}
"""Settings by the flat names of the Python API and the command line → (section of the spec, field)."""


def run_spec(base: RunSpec | None = None, effort: str | None = None, **settings: Any) -> RunSpec:
    """A `RunSpec` from flat settings (`bits=2, calib="c4"`), on top of `base` or of the defaults. Unknown names raise `SpecError`.

    effort: one of `EFFORTS`, whose settings lie between the two: those that the initializer has and `settings` does not name.
    bits: a fraction, such as 2.5, is the mean width; a whole number is every layer's, whatever mean `base` has.
    """
    unknown = set(settings) - set(FLAT)
    require(not unknown, f"unknown setting {named(unknown, ['effort', *FLAT])}; known: effort, {', '.join(FLAT)}")
    values = (base or RunSpec()).to_dict()
    if effort is not None:
        one_of("effort", effort, tuple(EFFORTS))
        init = settings.get("init", values["lora"]["init"])
        settings = {k: v for k, v in EFFORTS[effort].items() if init in (INITIALIZER_SETTINGS | RUN_SETTINGS).get(k, (init,))} | settings
    bits = settings.get("bits")
    if isinstance(bits, float):
        settings = {k: v for k, v in settings.items() if k != "bits"} | ({"bits": int(bits)} if bits.is_integer() else {"mean_bits": bits})
    if "bits" in settings:
        settings = {"mean_bits": None} | settings
    for name, value in settings.items():
        section, key = FLAT[name]
        if key in ("only", "skip") and isinstance(value, str):
            value = (value,)
        (values[section] if section else values)[key] = plain(value)
    return RunSpec.from_dict(values)

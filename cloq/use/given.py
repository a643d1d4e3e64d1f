"""A base that someone else quantized, and the model that it was made of: whether the one is the other, rounded.

Factors are fitted to `W − Q`, which is what rounding did only where nothing else was done to the weights. AWQ and SmoothQuant scale them
first and undo it in the norms before them, QuaRot rotates them; both leave a base that computes as it should and a `W − Q` that means
nothing. All of them leave their trace in the norms, which nobody quantizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from cloq.errors import ModelError
from cloq.export.read import QuantizedFolder
from cloq.models import Decoder

TOLERANCE = 0.01
"""Largest difference of a norm or bias, relative to its largest value, that passes for another precision: bfloat16's is 0.004."""


def open_given(folder: str | Path, decoder: Decoder, trust_remote_code: bool = False) -> QuantizedFolder:
    """The base in `folder`, for factors that undo what it did to `decoder`'s model.

    Raises `ExportError` if its quantization cannot be read, `ModelError` if it is damaged or not this model, rounded.
    """
    given = QuantizedFolder(folder)
    shapes = decoder.linear_shapes()
    for name in sorted(given.names & shapes.keys()):
        if given.shape(name) != shapes[name]:
            raise ModelError(
                f"{name} is {shapes[name]} in {decoder.folder} and {given.shape(name)} in {given.folder}: another model's base. "
                "Name the model that it was made of"
            )
    if differing := list(_differing(decoder, given.decoder(trust_remote_code=trust_remote_code))):
        name, difference = max(differing, key=lambda found: found[1])
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise ModelError(
            f"the base in {given.folder} is not {decoder.folder}, rounded: {name}{more} differ, by {difference:.0%}. Its weights were "
            "scaled or rotated before they were quantized (AWQ, SmoothQuant, QuaRot) or trained on, so that what rounding did to them "
            "cannot be told. Name the model that it was made of, or quantize anew with cloq quantize"
        )
    return given


def _differing(one: Decoder, other: Decoder) -> Iterator[tuple[str, float]]:
    """Norms and biases that differ by more than a change of precision, and by how much, relative to their largest value."""
    for name in one.source_names:
        if name in other.source_names and len((mine := one.read(name)).shape) == 1:
            theirs, mine = other.read(name).float(), mine.float()
            largest = max(float(mine.abs().max()), torch.finfo(torch.float32).tiny)
            difference = float((mine - theirs).abs().max()) / largest
            if difference > TOLERANCE:
                yield name, difference

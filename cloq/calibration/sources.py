"""Where calibration text comes from: names, hub data sets, local files, mixtures."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path

from cloq.errors import CalibrationError


def documents(source: str) -> Iterator[str]:
    """The documents of one source, in order. Raises `CalibrationError` before the first one if the source cannot be read."""
    if source == "demo":
        yield from (text for _, text in sorted(pydoc_data.topics.topics.items()))
    elif Path(source).is_file():
        yield Path(source).read_text("utf8")
    else:
        raise CalibrationError(f"unknown calibration source {source!r}")

"""What the options are called that a text was named by, for the remedies in messages: several commands read text as calibration does."""

from __future__ import annotations

from typing import NamedTuple


class Options(NamedTuple):
    """text: names the source. column: names a column of it. calibrates: takes mixtures and `self` too, which are sources for calibration
    alone."""

    text: str = "--calib"
    column: str = "--calib-column"
    calibrates: bool = True


CALIBRATION = Options()

"""Text → token batches; hooks on one block; Gram sums, and the drift beside them."""

from cloq.calibration.gram import gram_matrices, summed, topped_up
from cloq.calibration.hooks import shared_inputs
from cloq.calibration.paired import Junctions, Seen, adding_layers, junctions, paired_statistics
from cloq.calibration.sources import NAMES, documents
from cloq.calibration.tokens import CalibrationTokens, calibration_tokens, cut_sequences, draw_sequences, sequence_start

__all__ = [
    "NAMES",
    "CalibrationTokens",
    "Junctions",
    "Seen",
    "adding_layers",
    "calibration_tokens",
    "cut_sequences",
    "documents",
    "draw_sequences",
    "gram_matrices",
    "junctions",
    "paired_statistics",
    "sequence_start",
    "shared_inputs",
    "summed",
    "topped_up",
]

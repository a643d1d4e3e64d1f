"""Text → token batches; hooks on one block; Gram sums, and the drift beside them."""

from cloq.calibration.gram import gram_matrices, summed, topped_up
from cloq.calibration.hooks import hooked, shared_inputs
from cloq.calibration.paired import Junctions, Seen, adding_layers, junctions, paired_statistics
from cloq.calibration.parts import End, Ends, parts_that_end_in, standing_in
from cloq.calibration.sources import NAMES, documents
from cloq.calibration.tokens import CalibrationTokens, calibration_tokens, cut_sequences, draw_sequences, sequence_start

__all__ = [
    "NAMES",
    "CalibrationTokens",
    "End",
    "Ends",
    "Junctions",
    "Seen",
    "adding_layers",
    "calibration_tokens",
    "cut_sequences",
    "documents",
    "draw_sequences",
    "gram_matrices",
    "hooked",
    "junctions",
    "paired_statistics",
    "parts_that_end_in",
    "sequence_start",
    "shared_inputs",
    "standing_in",
    "summed",
    "topped_up",
]

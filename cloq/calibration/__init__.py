"""Text → token batches; hooks on one block; Gram sums."""

from cloq.calibration.gram import gram_matrices, shared_inputs
from cloq.calibration.sources import documents
from cloq.calibration.tokens import CalibrationTokens, draw_sequences

__all__ = ["CalibrationTokens", "documents", "draw_sequences", "gram_matrices", "shared_inputs"]

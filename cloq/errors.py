"""What can go wrong at the edge, in words a person can act on.

The command line prints any `CloqError` in one or two lines and exits with code 2; everything else is a bug and keeps its traceback.
Each message says what came, what is allowed, and what to do about it.
"""


class CloqError(Exception):
    """Base of every error that a user can cause and mend."""


class SpecError(CloqError, ValueError):
    """A setting is out of range, unknown, or contradicts another."""


class ModelError(CloqError):
    """The model is missing, incomplete, not a causal decoder, or holds values that cannot be quantized."""


class CalibrationError(CloqError):
    """The calibration text is missing, unreadable, empty or too short."""


class RunError(CloqError):
    """The output folder cannot be used: other content, other settings, a full or read-only disk, another run."""


class ProcessError(CloqError):
    """Another one of several processes failed or is gone, which ends the run for all of them."""


class TrainingError(CloqError):
    """Training cannot start or go on: no usable rows, nothing to train, a loss that is not a number."""


class ExportError(CloqError):
    """A format cannot hold this result, or a folder is not what its configuration says."""


class TaskError(CloqError):
    """A task is unknown, or its data are missing, lack a column, or do not fit the model's context."""


class MissingLibrary(CloqError, ImportError):
    """An optional library is needed; the message holds the pip command."""

    def __init__(self, library: str, purpose: str, extra: str | None = None):
        install = f'pip install "cloq[{extra}]"' if extra else f"pip install {library}"
        super().__init__(f"{purpose} needs the library {library}, which is not installed. Install it with: {install}")

"""Every error that attribution tells its caller; the message is one sentence with the fix, and the command exits with code 2.

AttributionError
├── PairsError      a pair file that cannot be read; names the file and the line
├── SAEError        an SAE folder that cannot be read, or that does not fit the model or the formula
├── SettingsError   the run is asked for something that cannot be done
├── ModelError      a model folder that cannot be read, or whose blocks are not where they should be
├── GradientError   a completion whose loss or gradient is not finite
├── StorageError    a disk that is full, or that does not give back what was written
├── FidelityError   the predictions do not agree with what was measured
├── GraderError     a grader that cannot be read, or reached
├── JournalError    a journal of another run, or one that cannot be written
├── ServingError    an endpoint that cannot be reached, or refuses, or a server that does not start
└── SelectionError  too few pairs, or no latent that passes the selection
"""

__all__ = [
    "AttributionError",
    "FidelityError",
    "GraderError",
    "GradientError",
    "JournalError",
    "ModelError",
    "PairsError",
    "SAEError",
    "SelectionError",
    "ServingError",
    "SettingsError",
    "StorageError",
]


class AttributionError(ValueError):
    """Base of the tree: nothing was written."""


class PairsError(AttributionError):
    """A pair file breaks the format of `pairs`."""


class SAEError(AttributionError):
    """An SAE cannot be read exactly, or belongs to a model of another shape."""


class SettingsError(AttributionError):
    """An option is missing, contradicts another, or names a place that cannot be written to."""


class ModelError(AttributionError):
    """A model cannot be loaded or split at the hook point."""


class GradientError(AttributionError):
    """A completion whose loss or gradient is NaN or infinite."""

    def __init__(self, completion: int, message: str = "") -> None:
        self.completion = completion
        """Its number: 2p is the positive of pair p, 2p + 1 its negative."""
        super().__init__(message or f"the gradient of completion {completion} is not finite; remove it, or run in fp32")


class StorageError(AttributionError):
    """What a run keeps on disk cannot be written or read; what is there stays, and the run can be resumed."""


class FidelityError(AttributionError):
    """Predicted and measured effects disagree, so the ranking cannot be believed."""


class GraderError(AttributionError):
    """A grader cannot be read, or cannot be reached."""


class JournalError(AttributionError):
    """A journal belongs to another run, is damaged, or cannot be written; what it holds is kept."""


class ServingError(AttributionError):
    """A model's endpoint cannot be used; what a journal holds is kept."""


class SelectionError(AttributionError):
    """The data leave nothing to select or to validate on."""

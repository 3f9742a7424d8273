"""Every error that attribution tells its caller; the message is one sentence with the fix, and the command exits with code 2.

AttributionError
├── PairsError      a pair file that cannot be read; names the file and the line
├── SAEError        an SAE folder that cannot be read, or that does not fit the model or the formula
├── SettingsError   the run is asked for something that cannot be done
├── ModelError      a model folder that cannot be read, or whose blocks are not where they should be
└── SelectionError  too few pairs, or no latent that passes the selection
"""

__all__ = ["AttributionError", "ModelError", "PairsError", "SAEError", "SelectionError", "SettingsError"]


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


class SelectionError(AttributionError):
    """The data leave nothing to select or to validate on."""

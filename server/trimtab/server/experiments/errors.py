"""What a caller of the experiments room can do wrong; part of the server's error tree.

InvalidRequest
└── InvalidExperiment     the definition breaks a rule; every violation with the path of its field
TrimtabError
├── UnknownExperiment     no experiment has that key
├── ExperimentState       the experiment's state does not allow the change
├── StaleRevision         somebody else changed it since it was read
└── ArmFailed             what a request's arm gives cannot be had in this replica now
"""

from trimtab.server.errors import InvalidRequest, TrimtabError

__all__ = ["ArmFailed", "ExperimentState", "InvalidExperiment", "StaleRevision", "UnknownExperiment"]


class InvalidExperiment(InvalidRequest):
    """The experiment cannot be run as it is written; nothing was stored."""

    code = "INVALID_EXPERIMENT"


class UnknownExperiment(TrimtabError):
    """No experiment has that key."""

    code = "UNKNOWN_EXPERIMENT"


class ExperimentState(TrimtabError):
    """The change is not allowed in the experiment's state."""

    code = "EXPERIMENT_STATE"


class StaleRevision(TrimtabError):
    """The experiment has changed since the caller read it; read it again."""

    code = "STALE_REVISION"


class ArmFailed(TrimtabError):
    """What the arm of a request gives cannot be had here now; the experiment fails closed."""

    code = "EXPERIMENT_ARM_FAILED"

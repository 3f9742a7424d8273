"""What a request is admitted under, beyond its own fields: who asks, what steers by default, how the kill switch stands. Pure."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trimtab.server.errors import Forbidden, Killed
from trimtab.server.fleet.defaults import Default, Defaults
from trimtab.server.fleet.switch import OFF, Switch
from trimtab.server.keys.key import ANONYMOUS, Caller
from trimtab.server.steering import Steering

__all__ = ["FREE", "Rules", "Source", "names"]

Source = Literal["request", "experiment", "alias", "key", "fleet"]
"""Who asked for the steering of a reply."""


def _as_written(name: str) -> str:
    return name


def _known() -> None:
    pass


@dataclass(frozen=True)
class Rules:
    """The state that one request is admitted in."""

    caller: Caller = ANONYMOUS
    defaults: Defaults = Defaults({})  # noqa: RUF009 — frozen
    switch: Switch = OFF
    resolve: Callable[[str], str] = _as_written
    """What a bundle's name means; raises what is wrong with it."""
    require_fresh: Callable[[], None] = _known
    """Raises when what is known is too old to steer by."""

    def default(self, alias: str | None) -> Default | None:
        """What steers a request that does not say."""
        return self.defaults.find(key_id=self.caller.key_id, alias=alias)

    def require_choice(self, default: Default | None, field: str) -> None:
        """Nothing, if a request may bring its own steering, or none, where a default applies.

        Raises:
            Forbidden: it may not.
        """
        if default is not None and not self.caller.policy.opt_out:
            raise Forbidden(
                f"replies to {self.caller.name} carry the default steering of the {default.kind}; to replace it or leave it out "
                "needs a key that may opt out",
                field=field,
            )

    def allow(self, steering: Steering) -> None:
        """Nothing, if the caller may ask for this.

        Raises:
            Forbidden, InvalidSteering: it may not.
            Revoked, Unavailable, UnknownBundle: a bundle cannot be used.
        """
        self.caller.check(steering, {name: self.resolve(name) for name in names(steering)})

    def killed(self) -> Switch | None:
        """The switch, if it keeps this request from being steered as asked.

        Raises:
            Killed: it refuses such requests.
        """
        if self.switch.mode == "off":
            return None
        if self.switch.mode == "refuse":
            raise Killed(f"steering is switched off: {self.switch.reason}")
        return self.switch


FREE = Rules()
"""Anybody, on a server without a registry."""


def names(steering: Steering) -> tuple[str, ...]:
    """The bundles that a `steering` field names, each once."""
    if steering.edits is None:
        return (steering.bundle or "",)
    gates = (edit.gate.bundle for edit in steering.edits if edit.gate is not None and edit.gate.bundle is not None)
    return tuple(dict.fromkeys((*(edit.bundle for edit in steering.edits), *gates)))

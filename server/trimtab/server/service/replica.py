"""This replica's share in the fleet: it follows the database, and does what the newest state says.

At once, on the event loop, whatever the engine does: keys, defaults and the kill switch take effect; revoked versions lose their
names, and requests that run on them end; so do steered requests when the switch is thrown. Loading what was promoted takes a
moment: it goes through every worker.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from trimtab.attribution.graders import Grader
from trimtab.server.database.database import Database
from trimtab.server.errors import Killed, Revoked, TrimtabError
from trimtab.server.experiments.exposures import Exposures
from trimtab.server.experiments.feature_flags import Assigner
from trimtab.server.experiments.keeper import Keeper
from trimtab.server.experiments.measurements import Measurements
from trimtab.server.experiments.outcomes import Outcomes
from trimtab.server.experiments.retention import Retention
from trimtab.server.experiments.store import Experiments
from trimtab.server.experiments.texts import Texts
from trimtab.server.fleet.defaults import DefaultSteering
from trimtab.server.fleet.follower import Follower
from trimtab.server.fleet.snapshot import Snapshot
from trimtab.server.fleet.switch import OFF, KillSwitch, Switch
from trimtab.server.keys.guard import Guard
from trimtab.server.keys.key import Caller
from trimtab.server.keys.limits import Limits
from trimtab.server.keys.secret import Secret
from trimtab.server.keys.store import Keys
from trimtab.server.registry.signature import Signatures
from trimtab.server.registry.store import Registry
from trimtab.server.service.catalogue import Catalogue
from trimtab.server.service.enrolment import Enroller
from trimtab.server.service.flights import Flight, Flights
from trimtab.server.service.grading import Graders
from trimtab.server.service.metrics import Metrics
from trimtab.server.service.rules import Rules
from trimtab.server.service.shelf import Shelf

__all__ = ["Replica"]

Result = TypeVar("Result")
RETRY_SECONDS = 5.0
"""Before a version that could not be loaded is tried again."""
log = logging.getLogger("trimtab")


class Replica:
    """What the service knows beside the engine."""

    def __init__(
        self,
        database: Database,
        shelf: Shelf,
        flights: Flights,
        *,
        fingerprint: str,
        secret: Secret,
        operator_key: str | None = None,
        signatures: Signatures | None = None,
        max_requests: int = 256,
        poll_seconds: float = 0.2,
        stale_after_seconds: float = 10.0,
        experiment_seconds: float = 5.0,
        purge_after_days: float | None = None,
        graders: Mapping[str, Grader] | None = None,
        assigner: Assigner | None = None,
    ) -> None:
        """Of a served model with this `fingerprint`."""
        self.database = database
        self.registry = Registry(database, signatures)
        self.keys = Keys(database, secret)
        self.switch = KillSwitch(database)
        self.defaults = DefaultSteering(database)
        self.experiments = Experiments(database)
        self.measurements = Measurements(database)
        self.outcomes = Outcomes(database)
        self.texts = Texts(database)
        self.exposures = Exposures(database)
        self.assigner = assigner
        self.graders = Graders(graders or {}, self.outcomes, self.exposures)
        self.retention = Retention(
            database, self.experiments, self.outcomes, self.texts, purge_after_days=purge_after_days
        )
        self._keeper = Keeper(self.experiments, self.measurements, every_seconds=experiment_seconds)
        self.digest = secret.digest
        self.guard = Guard(secret, operator_key=operator_key)
        self.limits = Limits(max_requests)
        self.flights = flights
        self.catalogue = Catalogue(shelf, fingerprint=fingerprint)
        self.follower = Follower(
            database, self._apply, poll_seconds=poll_seconds, stale_after_seconds=stale_after_seconds
        )
        self.not_loaded: dict[str, str] = {}
        """Active versions that could not be loaded here, and why."""
        self._shelf = shelf
        self._moved = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Takes over the present state, with all its bundles loaded or said why not, and follows from then on.

        Raises:
            Unavailable: the database does not answer.
        """
        await self.follower.refresh()
        await self._load()
        self._moved.clear()
        self.exposures.start()
        self.graders.start()
        self._tasks = [
            asyncio.create_task(self.follower.run()),
            asyncio.create_task(self._keep_loaded()),
            asyncio.create_task(_look(self._keeper.look, "experiments cannot be looked at")),
            # Apart, as a purge may take minutes, and a rollback may not.
            asyncio.create_task(_look(self.retention.look, "what is too old cannot be deleted")),
        ]

    async def close(self) -> None:
        """Follows no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.follower.close()
        await asyncio.to_thread(self.graders.close)
        await asyncio.to_thread(self.exposures.close)
        self.database.close()

    def rules(self, caller: Caller) -> Rules:
        """What a request of this caller is admitted under."""
        snapshot = self.catalogue.snapshot
        return Rules(caller, snapshot.defaults, snapshot.switch, self.catalogue.resolve, self.follower.require_fresh)

    def enroller(self, metrics: Metrics) -> Enroller:
        """What enrols this replica's requests in experiments."""
        metrics.exposures_waiting.set_function(lambda: self.exposures.n_waiting)
        return Enroller(
            self.catalogue,
            self.exposures,
            self.graders,
            metrics,
            decide=None if self.assigner is None else self.assigner.decide,
            digest=self.digest,
            is_stale=lambda: self.follower.is_stale,
        )

    async def change(self, verb: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """The result of a change of the database, which this replica has taken over when this returns."""
        result = await asyncio.to_thread(verb, *arguments, **options)
        await self.follower.refresh()
        return result

    def _apply(self, snapshot: Snapshot) -> None:
        before = self.catalogue.snapshot
        self.catalogue.snapshot = snapshot
        self.guard.know(snapshot.keys)
        wanted = set(self.catalogue.wanted())
        for name in [name for name in self._shelf if ":" in name and name not in wanted]:
            self._shelf.withdraw(name)
            self.not_loaded.pop(name, None)
        killed = _killed(snapshot.switch, before.switch)
        over = _over(snapshot, before)
        ended = self.flights.end(
            lambda flight: (
                _revoked(flight, snapshot) or (killed if flight.bundles else None) or over.get(flight.experiment or "")
            )
        )
        if snapshot.switch != before.switch and (snapshot.switch.mode, before.switch) != ("off", OFF):
            log.warning(
                "kill switch: %s (%s, by %s)", snapshot.switch.mode, snapshot.switch.reason, snapshot.switch.actor
            )
        if ended:
            log.warning("%d running requests were ended by change %d", ended, snapshot.sequence)
        self._moved.set()

    async def _keep_loaded(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait(), RETRY_SECONDS if self.not_loaded else None)
            self._moved.clear()
            await self._load()

    async def _load(self) -> None:
        """Holds every version that is wanted; one that cannot be held does not keep the others from it."""
        for reference in self.catalogue.wanted():
            if reference in self._shelf:
                continue
            version = self.catalogue.snapshot.by_reference[reference]
            try:
                bundle = await asyncio.to_thread(self.registry.bundle, version)
                await self._shelf.hold(reference, bundle)
            except TrimtabError as e:
                if self.not_loaded.get(reference) != e.message:
                    log.error("%s cannot be loaded: %s", reference, e.message)
                self.not_loaded[reference] = e.message
            except Exception as e:
                log.exception("%s cannot be loaded", reference)
                self.not_loaded[reference] = f"{type(e).__name__}; the log has the cause"
            else:
                self.not_loaded.pop(reference, None)
                if reference not in self.catalogue.wanted():  # It was revoked meanwhile.
                    self._shelf.withdraw(reference)


async def _look(look: Callable[[], float], failure: str) -> None:
    """Looks again and again, after so many seconds as each look says."""
    while True:
        try:
            wait = await asyncio.to_thread(look)
        except TrimtabError as e:
            log.error("%s: %s", failure, e.message)
            wait = RETRY_SECONDS
        except Exception:
            log.exception(failure)
            wait = RETRY_SECONDS
        await asyncio.sleep(wait)


def _revoked(flight: Flight, snapshot: Snapshot) -> TrimtabError | None:
    for content_hash in flight.bundles:
        version = snapshot.revoked.get(content_hash)
        if version is not None and version.running == "end":
            return Revoked(f"{version.reference}, which this reply was steered by, was revoked: {version.reason}")
    return None


def _over(now: Snapshot, before: Snapshot) -> dict[str, TrimtabError]:
    """By experiment, the end of what runs in those that were killed since."""
    known = {record.definition.key for record in before.experiments if record.ends_running}
    killed = {record.definition.key for record in now.experiments if record.ends_running}
    return {
        key: Killed(f"experiment {key!r} was killed while this reply was written; ask again to be served without it")
        for key in killed - known
    }


def _killed(now: Switch, before: Switch) -> TrimtabError | None:
    if now == before or now.mode == "off" or now.running == "finish":
        return None
    return Killed(f"steering was switched off while this reply was written: {now.reason}")

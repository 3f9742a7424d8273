"""What was measured of an experiment, out of the database: one row per unit for `analysis`, tallies, and rows to export.

A unit is of the arm of its exposures; one that was seen in two arms is of neither, and counted. Its outcomes are those of its
replies, and those that were told of the unit itself from its first exposure on; those told of it before are its covariates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa

from trimtab.server.database.database import Database
from trimtab.server.database.schema import experiment_entry, experiment_tally, exposure, outcome
from trimtab.server.experiments.assignment import shares
from trimtab.server.experiments.lifecycle import Record
from trimtab.server.experiments.sample import Units

__all__ = ["ArmCounts", "Measured", "Measurements"]

_COMPLIED = ("applied", "abandoned")


@dataclass(frozen=True)
class ArmCounts:
    """What became of the requests of one arm, forced ones apart."""

    n_units: int
    n_triggered_units: int
    n_requests: int
    statuses: Mapping[str, int]
    """Requests by how they ended."""

    @property
    def n_failed(self) -> int:
        """Requests that did not get what their arm gives, through the server's fault."""
        return sum(self.statuses.get(status, 0) for status in ("failed", "failed_open", "not_applied"))


@dataclass(frozen=True)
class Measured:
    """All of it, at one moment."""

    units: Units
    enrolled_at: tuple[str, ...]
    """When each of them was first exposed."""
    counts_EK: list[list[int]]
    """Units per stretch of equal coverage, by their first exposure, and arm."""
    shares_EK: list[tuple[float, ...]]
    arms: tuple[ArmCounts, ...]
    n_crossovers: int
    """Units that were seen in two arms; they are left out."""
    tallies: Mapping[str, int]
    """What all replicas have counted."""
    last_at: str | None
    """The time of the last exposure."""


class Measurements:
    """Reads them, from one database; all functions block."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def read(self, record: Record) -> Measured:
        """What is known of an experiment."""
        definition = record.definition
        key, arm_of = definition.key, {arm.key: i for i, arm in enumerate(definition.arms)}
        mine = sa.and_(exposure.c.experiment == key, sa.not_(exposure.c.forced))
        complied = sa.case((exposure.c.status.in_(_COMPLIED), 1), else_=0)
        by_unit = (
            sa.select(
                exposure.c.unit,
                sa.func.min(exposure.c.arm).label("arm"),
                sa.func.max(exposure.c.arm).label("other"),
                sa.func.max(sa.case((exposure.c.triggered, 1), else_=0)).label("triggered"),
                sa.func.min(complied).label("complied"),
                sa.func.min(exposure.c.at).label("at"),
                sa.func.min(exposure.c.revision).label("revision"),
            )
            .where(mine)
            .group_by(exposure.c.unit)
        )
        first = sa.select(exposure.c.unit, sa.func.min(exposure.c.at).label("at")).where(mine).group_by(exposure.c.unit)
        firsts = first.subquery()
        of_replies = (
            sa.select(exposure.c.unit, outcome.c.name, sa.func.sum(outcome.c.value))
            .join(outcome, outcome.c.subject == exposure.c.response_id)
            .where(mine)
            .group_by(exposure.c.unit, outcome.c.name)
        )
        later = sa.case((outcome.c.at >= firsts.c.at, 1), else_=0).label("later")
        of_units = (
            sa.select(firsts.c.unit, outcome.c.name, later, sa.func.sum(outcome.c.value))
            .join(outcome, outcome.c.subject == firsts.c.unit)
            .group_by(firsts.c.unit, outcome.c.name, "later")
        )
        by_status = (
            sa.select(exposure.c.arm, exposure.c.status, sa.func.count())
            .where(mine)
            .group_by(exposure.c.arm, exposure.c.status)
        )
        with self._database.read() as connection:
            rows = connection.execute(by_unit).all()
            replies = connection.execute(of_replies).all()
            told = connection.execute(of_units).all()
            statuses = connection.execute(by_status).all()
            stretches = _stretches(connection, key)
            tallies = _tallies(connection, key)
            last_at = connection.execute(
                sa.select(sa.func.max(exposure.c.at)).where(exposure.c.experiment == key)
            ).scalar_one()

        kept = [row for row in rows if row.arm == row.other and row.arm in arm_of]
        at = {row.unit: i for i, row in enumerate(kept)}
        outcomes: dict[str, Any] = {}
        covariates: dict[str, Any] = {}

        def add(to: dict[str, Any], unit: str, name: str, value: float) -> None:
            if (i := at.get(unit)) is not None:
                sums_U = to.setdefault(name, np.full(len(kept), np.nan))
                sums_U[i] = value if np.isnan(sums_U[i]) else sums_U[i] + value

        for unit, name, value in replies:
            add(outcomes, unit, name, value)
        for unit, name, is_later, value in told:
            add(outcomes if is_later else covariates, unit, name, value)
        arm_U = np.array([arm_of[row.arm] for row in kept], np.int64)
        units = Units(
            arm_U,
            np.array([bool(row.triggered) for row in kept], bool),
            np.array([bool(row.complied) for row in kept], bool),
            outcomes,
            covariates,
        )
        counts = [[0] * len(definition.arms) for _ in stretches]
        for row in kept:
            n = sum(revision <= row.revision for revision, _ in stretches[1:])
            counts[n][arm_of[row.arm]] += 1
        by_arm: list[dict[str, int]] = [{} for _ in definition.arms]
        for arm, status, n in statuses:
            if arm in arm_of:
                by_arm[arm_of[arm]][status] = n
        arms = tuple(
            ArmCounts(
                int((arm_U == i).sum()),
                int((units.triggered_U & (arm_U == i)).sum()),
                sum(by_arm[i].values()),
                by_arm[i],
            )
            for i in range(len(definition.arms))
        )
        return Measured(
            units,
            tuple(row.at for row in kept),
            counts,
            [shares(definition, coverage) for _, coverage in stretches],
            arms,
            len(rows) - len(kept),
            tallies,
            last_at,
        )

    def exposures(self, key: str, *, after: str, limit: int) -> list[dict[str, Any]]:
        """Exposures by response id, those after one."""
        query = (
            sa.select(exposure)
            .where(exposure.c.experiment == key, exposure.c.response_id > after)
            .order_by(exposure.c.response_id)
            .limit(limit)
        )
        with self._database.read() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def outcomes(self, key: str, *, after: str, limit: int) -> list[dict[str, Any]]:
        """Outcomes of the experiment's replies and units by subject, those of at most `limit` subjects after one."""
        mine = exposure.c.experiment == key
        subjects = sa.union(
            sa.select(exposure.c.response_id.label("subject"), exposure.c.unit, exposure.c.arm).where(mine),
            sa.select(exposure.c.unit, exposure.c.unit, exposure.c.arm).where(mine),
        ).subquery()
        chosen = (
            sa.select(outcome.c.subject)
            .where(outcome.c.subject.in_(sa.select(subjects.c.subject)), outcome.c.subject > after)
            .distinct()
            .order_by(outcome.c.subject)
            .limit(limit)
        )
        query = (
            sa.select(
                outcome.c.subject,
                subjects.c.unit,
                subjects.c.arm,
                outcome.c.name,
                outcome.c.event,
                outcome.c.value,
                outcome.c.at,
                outcome.c.received_at,
            )
            .join(subjects, subjects.c.subject == outcome.c.subject)
            .where(outcome.c.subject.in_(chosen))
            .order_by(outcome.c.subject, outcome.c.name, outcome.c.event, subjects.c.arm)
        )
        with self._database.read() as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
        for row in rows:
            row["response_id"] = row["subject"] if row["subject"] != row["unit"] else None
        return rows


def _stretches(connection: sa.Connection, key: str) -> list[tuple[int, float]]:
    """(first revision, coverage) of each stretch during which units were let in; at least one."""
    query = (
        sa.select(experiment_entry.c.revision, experiment_entry.c.coverage)
        .where(experiment_entry.c.experiment == key)
        .order_by(experiment_entry.c.revision)
    )
    found: list[tuple[int, float]] = []
    for revision, coverage in connection.execute(query):
        if coverage and (not found or found[-1][1] != coverage):
            found.append((revision, coverage))
    return found or [(1, 1.0)]


def _tallies(connection: sa.Connection, key: str) -> dict[str, int]:
    query = (
        sa.select(experiment_tally.c.name, sa.func.sum(experiment_tally.c.count))
        .where(experiment_tally.c.experiment == key)
        .group_by(experiment_tally.c.name)
    )
    return {name: int(n) for name, n in connection.execute(query)}

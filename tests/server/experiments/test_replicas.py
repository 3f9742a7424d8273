"""Replicas assign alike: two processes on one database, restarted, and through a ramp."""

import subprocess
import sys

import pytest

from tests.server.experiments.examples import written
from trimtab.server.database.database import Database
from trimtab.server.experiments.store import Experiments

N_UNITS = 100_000
KEY = "calm-replies"
_REPLICA = """
import sys
from trimtab.server.database.database import Database
from trimtab.server.experiments.assignment import assign
from trimtab.server.fleet.snapshot import read_snapshot
snapshot = read_snapshot(Database(sys.argv[1]))
(record,) = snapshot.experiments
for i in range(int(sys.argv[2])):
    arm = assign(record, {"user": f"user-{i}"}, holdout=snapshot.holdout).arm
    print("-" if arm is None else arm.key)
"""


def assigned(url: str) -> list[list[str]]:
    """The arms that two replicas give to the units; each is a new process."""
    replicas = [
        subprocess.Popen([sys.executable, "-c", _REPLICA, url, str(N_UNITS)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [replica.communicate(timeout=300)[0].split() for replica in replicas]
    assert [replica.returncode for replica in replicas] == [0, 0]
    return said


@pytest.mark.slow
def test_two_replicas_assign_alike_after_a_restart_and_a_ramp_moves_no_unit(database_url: str) -> None:
    database = Database(database_url)
    database.migrate()
    experiments = Experiments(database)
    experiments.create(written(ramp=[{"coverage": 0.1}]), actor="ann", reason="new")
    experiments.hold_out(0.05, actor="ann", reason="a holdout")
    experiments.change(KEY, "start", actor="ann", reason="go")
    first, second = assigned(database_url)
    assert len(first) == N_UNITS
    assert first == second
    again, _ = assigned(database_url)
    assert again == first
    experiments.change(KEY, "ramp", coverage=0.5, actor="ann", reason="ramp")
    ramped, other = assigned(database_url)
    assert ramped == other
    assert sum(before not in ("-", after) for before, after in zip(first, ramped, strict=True)) == 0
    enrolled = [sum(arm != "-" for arm in arms) / N_UNITS for arms in (first, ramped)]
    assert enrolled == pytest.approx([0.1 * 0.95, 0.5 * 0.95], abs=0.005)
    database.close()

"""Experiments: their definitions and trails, exposures, outcomes, and what each replica counted."""

import sqlalchemy as sa
from alembic import op

revision = "r0002"
down_revision = "r0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes the tables of experiments."""
    op.create_table(
        "experiment",
        sa.Column("key", sa.String(63), nullable=False),
        sa.Column("definition", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("coverage", sa.Double, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("changed_at", sa.String(32), nullable=False),
        sa.Column("covered_since", sa.String(32), nullable=False),
        sa.Column("started_at", sa.String(32)),
        sa.Column("step", sa.Integer),
        sa.Column("approved", sa.Integer, nullable=False),
        sa.Column("plans", sa.Text, nullable=False),
        sa.Column("ends_running", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_experiment"),
    )
    op.create_table(
        "experiment_entry",
        sa.Column("experiment", sa.String(63), nullable=False),
        sa.Column("revision", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("coverage", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("experiment", "revision", name="pk_experiment_entry"),
        sa.ForeignKeyConstraint(["experiment"], ["experiment.key"], name="fk_experiment_entry_experiment"),
    )
    op.create_table(
        "experiment_holdout",
        sa.Column("name", sa.String(32), nullable=False),
        sa.Column("share", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_experiment_holdout"),
    )
    op.create_table(
        "exposure",
        sa.Column("response_id", sa.String(64), nullable=False),
        sa.Column("experiment", sa.String(63), nullable=False),
        sa.Column("arm", sa.String(63), nullable=False),
        sa.Column("unit", sa.String(64), nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
        sa.Column("forced", sa.Boolean, nullable=False),
        sa.Column("triggered", sa.Boolean, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.PrimaryKeyConstraint("response_id", name="pk_exposure"),
    )
    op.create_index("ix_exposure_experiment_unit", "exposure", ["experiment", "unit"])
    op.create_index("ix_exposure_experiment_response_id", "exposure", ["experiment", "response_id"])
    op.create_table(
        "outcome",
        sa.Column("subject", sa.String(64), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("event", sa.String(64), nullable=False),
        sa.Column("value", sa.Double, nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
        sa.Column("received_at", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("subject", "name", "event", name="pk_outcome"),
    )
    op.create_table(
        "experiment_tally",
        sa.Column("experiment", sa.String(63), nullable=False),
        sa.Column("replica", sa.String(32), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("count", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("experiment", "replica", "name", name="pk_experiment_tally"),
    )


def downgrade() -> None:
    """Drops them, and all that they hold."""
    for table in ("experiment_tally", "outcome", "exposure", "experiment_holdout", "experiment_entry", "experiment"):
        op.drop_table(table)

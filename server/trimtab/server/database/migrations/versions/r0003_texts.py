"""Sampled texts: what was asked and answered, where an experiment keeps it, and until when."""

import sqlalchemy as sa
from alembic import op

revision = "r0003"
down_revision = "r0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes their table."""
    op.create_table(
        "sampled_text",
        sa.Column("response_id", sa.String(64), nullable=False),
        sa.Column("experiment", sa.String(63), nullable=False),
        sa.Column("arm", sa.String(63), nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
        sa.Column("until", sa.String(32), nullable=False),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("reply", sa.Text, nullable=False),
        sa.Column("cut", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("response_id", name="pk_sampled_text"),
    )
    op.create_index("ix_sampled_text_experiment_response_id", "sampled_text", ["experiment", "response_id"])
    op.create_index("ix_sampled_text_until", "sampled_text", ["until"])


def downgrade() -> None:
    """Drops it, and the texts."""
    op.drop_table("sampled_text")

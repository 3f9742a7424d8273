"""The tables. Times are UTC text (`2026-11-25T15:46:04.123456Z`), which sorts and means the same in every database.

A change here goes with a migration in `migrations/versions`; a test holds the two together.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

__all__ = [
    "api_key",
    "audit",
    "blob",
    "bundle_version",
    "experiment",
    "experiment_entry",
    "experiment_tally",
    "exposure",
    "holdout",
    "metadata",
    "outcome",
    "sampled_text",
    "secret_check",
    "steering_default",
    "switch",
]

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

audit = Table(
    "audit",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    Column("at", String(32), nullable=False),
    Column("actor", String(128), nullable=False),
    Column("action", String(64), nullable=False),
    Column("subject", String(256), nullable=False),
    Column("detail", Text, nullable=False),
    Column("previous", String(71), nullable=False),
    Column("digest", String(71), nullable=False),
)

blob = Table(
    "blob",
    metadata,
    Column("digest", String(71), primary_key=True),
    Column("data", LargeBinary, nullable=False),
)

bundle_version = Table(
    "bundle_version",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("state", String(16), nullable=False),
    Column("is_default", Boolean, nullable=False),
    Column("content_hash", String(71), nullable=False, unique=True),
    Column("file_digest", String(71), ForeignKey("blob.digest"), nullable=False),
    Column("n_bytes", Integer, nullable=False),
    Column("model", String(256), nullable=False),
    Column("fingerprint", String(128), nullable=False),
    Column("hook_point", String(64), nullable=False),
    Column("behaviour", Text, nullable=False),
    Column("signature", Text),
    Column("created_at", String(32), nullable=False),
    Column("created_by", String(128), nullable=False),
    Column("changed_at", String(32), nullable=False),
    Column("reason", Text, nullable=False),
    Column("running", String(16)),
)

api_key = Table(
    "api_key",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("label", String(128), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("scopes", Text, nullable=False),
    Column("policy", Text, nullable=False),
    Column("created_at", String(32), nullable=False),
    Column("created_by", String(128), nullable=False),
    Column("expires_at", String(32)),
    Column("revoked_at", String(32)),
    Column("rotated_from", String(16)),
)

secret_check = Table(
    "secret_check",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("digest", String(64), nullable=False),
)

steering_default = Table(
    "steering_default",
    metadata,
    Column("kind", String(16), primary_key=True),
    Column("subject", String(128), primary_key=True),
    Column("document", Text, nullable=False),
)

switch = Table(
    "kill_switch",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("mode", String(16), nullable=False),
    Column("fallback", Text),
    Column("running", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("actor", String(128), nullable=False),
    Column("at", String(32), nullable=False),
)

experiment = Table(
    "experiment",
    metadata,
    Column("key", String(63), primary_key=True),
    Column("definition", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("coverage", Double, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("changed_at", String(32), nullable=False),
    Column("covered_since", String(32), nullable=False),
    Column("started_at", String(32)),
    Column("step", Integer),
    Column("approved", Integer, nullable=False),
    Column("plans", Text, nullable=False),
    Column("ends_running", Boolean, nullable=False),
)

experiment_entry = Table(
    "experiment_entry",
    metadata,
    Column("experiment", String(63), ForeignKey("experiment.key"), primary_key=True),
    Column("revision", Integer, primary_key=True, autoincrement=False),
    Column("action", String(16), nullable=False),
    Column("actor", String(128), nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", String(32), nullable=False),
    Column("state", String(16), nullable=False),
    Column("coverage", Double, nullable=False),
)

holdout = Table(
    "experiment_holdout",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("share", Double, nullable=False),
)

# The tables below are written by the thousand and are no changes of the fleet: nobody has to read anew after them.
exposure = Table(
    "exposure",
    metadata,
    Column("response_id", String(64), primary_key=True),
    Column("experiment", String(63), nullable=False),
    Column("arm", String(63), nullable=False),
    Column("unit", String(64), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("at", String(32), nullable=False),
    Column("forced", Boolean, nullable=False),
    Column("triggered", Boolean, nullable=False),
    Column("status", String(16), nullable=False),
    Index("ix_exposure_experiment_unit", "experiment", "unit"),
    Index("ix_exposure_experiment_response_id", "experiment", "response_id"),
)

outcome = Table(
    "outcome",
    metadata,
    Column("subject", String(64), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("event", String(64), primary_key=True),
    Column("value", Double, nullable=False),
    Column("at", String(32), nullable=False),
    Column("received_at", String(32), nullable=False),
)

sampled_text = Table(
    "sampled_text",
    metadata,
    Column("response_id", String(64), primary_key=True),
    Column("experiment", String(63), nullable=False),
    Column("arm", String(63), nullable=False),
    Column("at", String(32), nullable=False),
    Column("until", String(32), nullable=False),
    Column("prompt", Text, nullable=False),
    Column("reply", Text, nullable=False),
    Column("cut", Boolean, nullable=False),
    Index("ix_sampled_text_experiment_response_id", "experiment", "response_id"),
    Index("ix_sampled_text_until", "until"),
)

experiment_tally = Table(
    "experiment_tally",
    metadata,
    Column("experiment", String(63), primary_key=True),
    Column("replica", String(32), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("count", BigInteger, nullable=False),
)

"""Alembic's entry: migrations run on the connection that `Database.migrate` holds, in its transaction."""

from alembic import context

from trimtab.server.database.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite alters no column in place.
    transactional_ddl=False,  # The transaction is the caller's.
)
context.run_migrations()

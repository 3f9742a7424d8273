"""The one database of a fleet: bundles, keys, controls and the audit log; SQLite in a file by default, PostgreSQL by URL.

`database` opens it, reads, and changes it under one lock with an audit entry for every change; `audit` is the chain of those
entries; `migrations` make the tables. Each room writes down its own tables on `schema.metadata`.
"""

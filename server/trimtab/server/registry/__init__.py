"""The registry: immutable versions of bundles, their states, and who changed them; one for all replicas of a fleet.

`version` is a version and its life; `store` keeps them in the database; `signature` checks who vouches for their bytes.
"""

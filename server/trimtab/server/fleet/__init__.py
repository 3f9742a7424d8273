"""What all replicas of a fleet share and follow: the kill switch, default steering, and the snapshot of them, keys and versions.

`switch` and `defaults` are kept in the database; `snapshot` is one state of all that a replica goes by; `follower` keeps a
replica at the newest one.
"""

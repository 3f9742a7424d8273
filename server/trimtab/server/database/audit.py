"""The audit log: every change, who made it and when, chained by digests. Pure.

    digest = sha256(JSON [sequence, at, actor, action, subject, detail, previous])       previous of the first entry: 64 zeros

An entry that is changed, taken out or slipped in breaks the chain from there on. Whoever can write to the database could write
the whole chain anew, or cut off its end: a digest that was noted down elsewhere (each change's is logged) shows that.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from trimtab.server.errors import Tampered

__all__ = ["BEGINNING", "Entry", "canonical", "link", "verify"]

BEGINNING = "sha256:" + "0" * 64


class Entry(NamedTuple):
    """One change."""

    sequence: int
    """1, 2, 3, … without gaps."""
    at: str
    actor: str
    """`key:ID`, `cli:USER`, `operator` (the key that the server was started with), or `anonymous` on loopback."""
    action: str
    """`bundle.promote`, `key.create`, `switch.kill`, …"""
    subject: str
    """What was changed: `calm:v3`, a key's id, …"""
    detail: dict[str, Any]
    previous: str
    digest: str


def canonical(detail: dict[str, Any]) -> str:
    """The one JSON text of a detail."""
    return json.dumps(detail, sort_keys=True, separators=(",", ":"), allow_nan=False)


def link(sequence: int, at: str, actor: str, action: str, subject: str, detail: dict[str, Any], previous: str) -> Entry:
    """The entry that follows the one whose digest is `previous`."""
    text = json.dumps([sequence, at, actor, action, subject, canonical(detail), previous], separators=(",", ":"))
    digest = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    return Entry(sequence, at, actor, action, subject, detail, previous, digest)


def verify(entries: Iterable[Entry], *, head: str | None = None) -> Entry | None:
    """The last entry of a whole chain, None of an empty one; `head` is a digest, noted earlier, that must be in it.

    Raises:
        Tampered: the chain is broken; the message says where.
    """
    last: Entry | None = None
    seen = head is None
    for entry in entries:
        expected = 1 if last is None else last.sequence + 1
        if entry.sequence != expected:
            raise Tampered(f"the audit log is broken: entry {expected} is missing, {entry.sequence} follows")
        if entry != link(*entry[:-2], BEGINNING if last is None else last.digest):
            raise Tampered(
                f"the audit log is broken at entry {entry.sequence} ({entry.action} of {entry.subject}): it, or the one before "
                "it, is not what was written; restore the database from before, and compare"
            )
        last = entry
        seen = seen or entry.digest == head
    if not seen:
        raise Tampered(f"the audit log does not hold {head}: its end was cut off, or all of it was written anew")
    return last

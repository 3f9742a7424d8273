"""A journal: what a long run has done so far, one JSON object a line, so that a run that was stopped goes on where it was.

The first line says what was asked of the run; a journal of something else is refused. Every later line is a record under a key
that is its own. A line that was cut short by a crash is dropped; a journal is written by one run at a time.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from trimtab.attribution.errors import JournalError

__all__ = ["Journal"]


class Journal:
    """The records of a run, by key; `add` returns when the record is with the operating system."""

    def __init__(self, path: Path, file: IO[bytes], records: dict[str, dict[str, Any]]) -> None:
        self.path, self._file, self._records = path, file, records

    @classmethod
    @contextmanager
    def open(cls, path: Path, asked: Mapping[str, Any]) -> Iterator[Journal]:
        """The journal at `path`, begun if it is not there; `asked` is all that changes what a record means.

        Raises:
            JournalError: it is of a run that was asked something else, damaged, in use, or cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab+", buffering=0)
        except OSError as e:
            raise JournalError(f"cannot write journal {path}: {e.strerror}; choose a folder you can write to") from e
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as e:
                raise JournalError(
                    f"journal {path} is being written by another run; wait for it, or name another"
                ) from e
            journal = cls(path, file, {})
            journal._read(json.loads(json.dumps(dict(asked))))
            yield journal

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._records[key]

    def __len__(self) -> int:
        return len(self._records)

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a record.

        Raises:
            JournalError: the disk is full, or gone.
        """
        self._write({"key": key, **record})
        self._records[key] = dict(record)

    def _write(self, line: Mapping[str, Any]) -> None:
        data = json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        start = self._file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as e:
            self._file.truncate(start)  # Half a record is none.
            raise JournalError(
                f"cannot write journal {self.path}: {e.strerror}; make room and start again, it goes on from here"
            ) from e

    def _read(self, asked: dict[str, Any]) -> None:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        self._file.truncate(whole)  # A crash cut the last line short.
        lines = data[:whole].splitlines()
        if not lines:
            self._write({"asked": asked})
            return
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if number == 1:
                    self._same(record["asked"], asked)
                else:
                    self._records[record.pop("key")] = record
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                if isinstance(e, JournalError):
                    raise
                raise JournalError(
                    f"{self.path}, line {number} is no line of a journal ({e}); remove that line, or name another file"
                ) from e

    def _same(self, begun: dict[str, Any], asked: dict[str, Any]) -> None:
        for field in sorted({*begun, *asked}):
            if begun.get(field) != asked.get(field):
                raise JournalError(
                    f"journal {self.path} was begun with {field} {_short(begun.get(field))}, and this run has "
                    f"{_short(asked.get(field))}; name another journal, or remove that one"
                )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"

"""Exposures, outcomes and sampled texts in a file: CSV, JSON lines, or Parquet (`pip install 'trimtab[reports]'`)."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

__all__ = ["COLUMNS", "What", "write"]

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "exposures": ("response_id", "experiment", "arm", "unit", "revision", "at", "forced", "triggered", "status"),
    "outcomes": ("subject", "response_id", "unit", "arm", "name", "event", "value", "at", "received_at"),
    "texts": ("response_id", "experiment", "arm", "at", "until", "prompt", "reply", "cut"),
}
What = Literal["exposures", "outcomes", "texts"]
_BATCH = 10_000


def write(path: Path, what: What, rows: Iterable[Mapping[str, Any]]) -> int:
    """How many rows were written; nothing is left in the place of the file if they could not be read to the end.

    Raises:
        ValueError: the file cannot be written, or its name ends in nothing that is known.
    """
    writers = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix.lower() not in writers:
        raise ValueError(f"{path} ends in {path.suffix!r}; rows are written to a .csv, .jsonl or .parquet file")
    half = path.with_name(f"{path.name}.part")
    try:
        n = writers[path.suffix.lower()](half, COLUMNS[what], iter(rows))
        half.replace(path)
    except OSError as e:
        raise ValueError(f"cannot write {path}: {e.strerror}") from e
    finally:
        half.unlink(missing_ok=True)
    return n


def _csv(path: Path, columns: tuple[str, ...], rows: Iterator[Mapping[str, Any]]) -> int:
    n = 0
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(columns)
        for row in rows:
            out.writerow([row[name] for name in columns])
            n += 1
    return n


def _jsonl(path: Path, columns: tuple[str, ...], rows: Iterator[Mapping[str, Any]]) -> int:
    n = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({name: row[name] for name in columns}, ensure_ascii=False) + "\n")
            n += 1
    return n


def _parquet(path: Path, columns: tuple[str, ...], rows: Iterator[Mapping[str, Any]]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    at = pa.timestamp("us", tz="UTC")
    kinds = {"revision": pa.int64(), "value": pa.float64()}
    kinds |= dict.fromkeys(("forced", "triggered", "cut"), pa.bool_()) | dict.fromkeys(
        ("at", "received_at", "until"), at
    )
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in columns])
    n = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as out:
        while batch := list(islice(rows, _BATCH)):
            arrays = [
                pa.array([row[name] for row in batch], pa.string()).cast(at)
                if field.type == at
                else pa.array([row[name] for row in batch], field.type)
                for name, field in zip(columns, schema, strict=True)
            ]
            out.write_table(pa.Table.from_arrays(arrays, schema=schema))
            n += len(batch)
    return n

"""Rows of a JSONL or Parquet file one after the other, each with where it stands, and a clear word on what is broken."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError

Located = tuple[str, dict[str, Any]]  # where a row stands, for messages, and the row
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PARQUET = b"PAR1"


def read_rows(path: Path, argument: str) -> Iterator[Located]:
    """The rows of a file, Parquet if it begins like one and JSONL otherwise; blank lines are no rows.

    Args:
        path: the file. A byte order mark at its start is no part of the first line.
        argument: whose value the path is, for messages.

    Raises:
        UserError: not UTF-8, broken JSON, a line that is no object, a torn Parquet; with file and line or rows.
    """
    with open(path, "rb") as file:
        parquet = file.read(len(PARQUET)) == PARQUET or path.suffix == ".parquet"
    return _read_parquet(path, argument) if parquet else _read_jsonl(path, argument)


def _read_jsonl(path: Path, argument: str) -> Iterator[Located]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            text = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if not text.strip():
                continue
            try:
                row = json.loads(text.decode())
            except UnicodeDecodeError as error:
                raise UserError(f"{argument}: {where} is not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None
            except (ValueError, RecursionError) as error:
                said = f"{error.msg}, character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)[:100]
                raise UserError(f"{argument}: {where} is broken JSON ({said}); mend it: one object with named columns") from None
            if not isinstance(row, dict):
                kind = type(row).__name__
                raise UserError(f"{argument}: {where} holds a {kind}; every line must be an object with named columns")
            yield where, row


def _read_parquet(path: Path, argument: str) -> Iterator[Located]:
    pq: Any = importlib.import_module("pyarrow.parquet")
    where, number = f"{path}", 0
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        for group in range(file.num_row_groups):
            where = f"{path}, row group {group + 1} of {file.num_row_groups} (from row {number + 1})"
            for row in file.read_row_group(group).to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except Exception as error:  # pyarrow has many kinds
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{argument}: {where} is torn or no Parquet ({cause}); fetch the file again") from error

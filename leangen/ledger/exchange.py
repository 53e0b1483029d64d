"""Receipts to and from files: JSON lines, CSV, Parquet, and codecarbon's `emissions.csv`.

JSON lines hold one receipt a line. CSV and Parquet have flat columns for people and other programs,
and the whole receipt as JSON in the last column, `receipt`; that is what is read back, so all three
lose nothing. Only receipts travel this way: chains and compacted sums do with `Ledger.merge`.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from leangen.errors import RequestError, SourceError, needs
from leangen.files import atomic_file
from leangen.ledger import Ledger, Merged, codecarbon
from leangen.ledger.rows import canonical, derive

COLUMNS = {
    "id": "id",
    "started_at": "started_at",
    "host": "host.id",
    "device": "host.device",
    "model": "model",
    "scheme": "scheme",
    "family": "family",
    "tag": "tag",
    "unit": "units.kind",
    "units": "units.count",
    "total_s": "latency.total_s",
    "ttft_s": "latency.ttft_s",
    "source": "energy.source",
    "reason": "energy.reason",
    "gross_j": "energy.gross_j",
    "u_j": "energy.u_j",
    "idle_j": "energy.idle_j",
    "marginal_j": "energy.marginal_j",
    "marginal_u_j": "energy.marginal_u_j",
    "per_unit_j": "energy.per_unit_j",
    "carbon_g": "carbon.g",
    "intensity_g_per_kwh": "carbon.intensity_g_per_kwh",
    "region": "carbon.region",
    "peak_rss_bytes": "memory.peak_rss_bytes",
}
"""The flat columns, and where a receipt has them."""
TEXTS = {"id", "started_at", "host", "device", "model", "scheme", "family", "tag", "unit"} | {
    *("source", "reason", "region")
}
PARQUET_ROWS = 10_000
LONGEST_FIELD = 2**27

Receipts = Iterable[dict[str, Any]]


def export(ledger: Ledger, path: Path, form: str) -> int:
    """Write all receipts, in the order of arrival, to `path`; how many there were.

    `form` is a key of `FORMS`. Raises RequestError for another, DependencyError where Parquet's
    library is missing, StorageError when the disk takes it not; then `path` is as it was.
    """
    if form not in FORMS:
        raise RequestError(f"cannot export as {form!r}: expected one of {', '.join(FORMS)}")
    count = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal count
        for receipt in ledger.documents():
            count += 1
            yield receipt

    with atomic_file(path) as file:
        FORMS[form](counted(), file)
    return count


def load(ledger: Ledger, path: Path) -> Merged:
    """Append the receipts of a file that `export` or codecarbon wrote, all or none.

    Receipts that are in the ledger already are skipped. Raises SourceError, with the row, for what
    is not such a file, StorageError for a conflict, DependencyError as `export` does.
    """
    try:
        with path.open("rb") as file, _long_fields():
            receipts, partial = _read(file, path)
            return ledger.add(_checked(receipts, path), partial=partial)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error


@contextmanager
def _long_fields() -> Iterator[None]:
    """A receipt is one field, whatever its length; the limit is the process's and is put back."""
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _checked(receipts: Receipts, path: Path) -> Iterator[dict[str, Any]]:
    """The receipts, with SourceError in place of what parsing raises."""
    iterator = iter(receipts)
    for number in itertools.count(1):
        try:
            receipt = next(iterator)
            derive(receipt)
            canonical(receipt)
        except StopIteration:
            return
        except (ValueError, RecursionError, csv.Error) as error:
            raise SourceError(
                f"{path}: receipt {number} cannot be read: {error}; nothing was imported, "
                f"expected what `leangen ledger export` writes ({', '.join(FORMS)})"
            ) from error
        yield receipt


def _read(file: BinaryIO, path: Path) -> tuple[Receipts, bool]:
    """The receipts, and whether the form holds only part of a receipt."""
    start = file.read(4)
    file.seek(0)
    if start == b"PAR1":
        return _from_parquet(file), False
    if start[:1] == b"{":
        return (_parse(line) for line in file if line.strip()), False
    return _from_csv(file, path)


def _parse(text: str | bytes) -> dict[str, Any]:
    receipt = json.loads(text, parse_constant=_no_constant)
    if not isinstance(receipt, dict):
        raise ValueError("it is no JSON object")
    return receipt


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _flat(receipt: dict[str, Any]) -> dict[str, Any]:
    row = {}
    for name, where in COLUMNS.items():
        value: Any = receipt
        for key in where.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        row[name] = value
    return row | {"receipt": canonical(receipt)}


def _to_jsonl(receipts: Receipts, file: BinaryIO) -> None:
    for receipt in receipts:
        file.write(canonical(receipt).encode() + b"\n")


def _write_csv(rows: Iterable[dict[str, Any]], columns: Iterable[str], file: BinaryIO) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(rows)  # None is written as an empty field
    text.flush()
    text.detach()


def _to_csv(receipts: Receipts, file: BinaryIO) -> None:
    _write_csv(map(_flat, receipts), (*COLUMNS, "receipt"), file)


def _to_codecarbon(receipts: Receipts, file: BinaryIO) -> None:
    _write_csv(map(codecarbon.row_of, receipts), codecarbon.COLUMNS, file)


def _from_csv(file: BinaryIO, path: Path) -> tuple[Receipts, bool]:
    lines = (line.decode("utf-8" if at else "utf-8-sig") for at, line in enumerate(file))
    reader = csv.DictReader(lines, strict=True)
    try:
        columns = reader.fieldnames or ()
    except (UnicodeDecodeError, csv.Error):
        columns = ()
    if "receipt" in columns:
        return (_parse(row["receipt"] or "") for row in reader), False
    if codecarbon.NEEDED <= set(columns):
        return (codecarbon.receipt_of(row) for row in reader), True
    raise SourceError(
        f"{path} is no file of receipts: expected JSON lines, Parquet, a CSV with a column "
        f"`receipt`, or codecarbon's with {', '.join(sorted(codecarbon.NEEDED))}"
    )


def _to_parquet(receipts: Receipts, file: BinaryIO) -> None:
    arrow, parquet = _pyarrow()
    schema = arrow.schema(
        [(name, arrow.string() if name in TEXTS else arrow.float64()) for name in COLUMNS]
        + [("receipt", arrow.string())]
    )
    rows = map(_flat, receipts)
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        while group := list(itertools.islice(rows, PARQUET_ROWS)):
            writer.write_table(arrow.Table.from_pylist(group, schema=schema))


def _from_parquet(file: BinaryIO) -> Receipts:
    arrow, parquet = _pyarrow()
    try:
        source = parquet.ParquetFile(file)
        for batch in source.iter_batches(columns=["receipt"]):
            yield from (_parse(text or "") for text in batch.column(0).to_pylist())
    except (arrow.ArrowException, IndexError) as error:
        raise ValueError(f"no Parquet file with a column `receipt` ({error})") from error


def _pyarrow() -> tuple[Any, Any]:
    message = "Parquet needs pyarrow: pip install 'leangen[parquet]'"
    with needs("pyarrow", "pyarrow.parquet", message=message):
        import pyarrow
        import pyarrow.parquet
    return pyarrow, pyarrow.parquet


FORMS: dict[str, Callable[[Receipts, BinaryIO], None]] = {
    "csv": _to_csv,
    "jsonl": _to_jsonl,
    "parquet": _to_parquet,
    "codecarbon": _to_codecarbon,
}
"""What `export` can write."""

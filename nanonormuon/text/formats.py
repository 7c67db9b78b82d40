"""The text in files of records: JSON lines and arrays, CSV, Parquet.

Each reader takes an open binary file, its name for messages, and the field that holds the text. It
yields the texts one by one, with one record in memory, and raises DataError naming the line. TSV
has no quoting: a quote is text, and a field holds neither tabs nor line ends.
"""

import codecs
import csv
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from types import SimpleNamespace
from typing import Any

from nanonormuon.errors import DataError
from nanonormuon.runtime.packages import need

RECORD_LIMIT = 64 << 20  # bytes; a record is parsed as a whole
DEEPEST = 1000  # lists and objects within each other in a JSON array


def _lines(file: Any, name: str) -> Iterator[bytes]:
    for number, line in enumerate(iter(partial(file.readline, RECORD_LIMIT), b""), 1):
        if len(line) == RECORD_LIMIT:
            raise DataError(f"{name}:{number}: a line of more than {RECORD_LIMIT >> 20} MB")
        yield line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _json_lines(file: Any, name: str, text_field: str) -> Iterator[bytes]:
    for number, line in enumerate(_lines(file, name), 1):
        where = f"{name}:{number}"
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: a JSON record expected: {error}") from None
            yield _field(record, text_field, where)


def _json_array(file: Any, name: str, text_field: str) -> Iterator[bytes]:
    # ijson's faster backend in C changes lone surrogates, and deep nesting takes all memory there
    parser = need("ijson.backends.python", f"{name}: a JSON array")
    errors = (need("ijson", name).JSONError, ValueError, RecursionError)
    number, left = 0, RECORD_LIMIT

    def read(size: int) -> bytes:
        nonlocal left
        left -= size
        return file.read(size) if left >= 0 else b""  # as if it ended: one item is too long

    def shallow(events: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        depth = 0
        for event, value in events:
            depth += event.startswith("start_") - event.startswith("end_")
            if depth > DEEPEST:  # its time and memory grow with the square of the depth
                raise ValueError(f"nested more than {DEEPEST} deep")
            yield event, value

    if file.peek(3).startswith(codecs.BOM_UTF8):
        file.read(3)
    try:
        events = parser.basic_parse(SimpleNamespace(read=read))
        for record in parser.items(parser.parse(shallow(events)), "item"):
            number, left = number + 1, RECORD_LIMIT
            yield _field(record, text_field, f"{name}: item {number}")
    except DataError:
        raise
    except errors as error:
        problem = "no valid JSON" if left >= 0 else f"more than {RECORD_LIMIT >> 20} MB"
        raise DataError(f"{name}: after item {number}: {problem}: {error}") from None


def _field(record: Any, text_field: str, where: str) -> bytes:
    """The UTF-8 text of a record, which is a string or has one in its field; null gives none."""
    if isinstance(record, dict):
        if text_field not in record:
            raise DataError(_missing(where, text_field, record))
        record = record[text_field]
    if record is None:
        return b""
    if not isinstance(record, str):
        raise DataError(
            f"{where}: text expected in {text_field!r}, {type(record).__name__} found;"
            " name another with --text-field"
        )
    return record.encode("utf-8", "surrogatepass")


def _missing(where: str, text_field: str, found: Iterable[str]) -> str:
    names = ", ".join(map(str, found))[:200] or "none"
    return f"{where}: no field {text_field!r}, found {names}; name one with --text-field"


def _csv(file: Any, name: str, text_field: str, delimiter: str = ",") -> Iterator[bytes]:
    csv.field_size_limit(RECORD_LIMIT)
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    lines = map(bytes.decode, _lines(file, name))
    rows = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    try:
        header = next(rows, [])
        if header and text_field not in header:
            raise DataError(_missing(name, text_field, header))
        for row in filter(None, rows):
            if len(row) != len(header):
                raise DataError(
                    f"{name}:{rows.line_num}: {len(header)} columns expected, {len(row)} found"
                )
            yield row[header.index(text_field)].encode()
    except csv.Error as error:
        raise DataError(f"{name}:{rows.line_num}: {error}") from None
    except UnicodeDecodeError as error:  # in the line after those that are counted
        raise DataError(f"{name}:{rows.line_num + 1}: {error}") from None


def _parquet(file: Any, name: str, text_field: str) -> Iterator[bytes]:
    parquet, pyarrow = need("pyarrow.parquet", f"{name}: Parquet"), need("pyarrow", name)
    try:
        # a buffer, or whole column chunks are read at once
        table = parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        if text_field not in (names := table.schema_arrow.names):
            raise DataError(_missing(name, text_field, names))
        batches = table.iter_batches(128, columns=[text_field], use_threads=False)
        values = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
        for row, value in enumerate(values, 1):
            yield _field(value, text_field, f"{name}: row {row}")
    except pyarrow.ArrowException as error:
        raise DataError(f"{name}: damaged Parquet: {str(error)[:200]}") from None


READ: dict[str, Callable[[Any, str, str], Iterator[bytes]]] = {
    "lines": _json_lines,
    "array": _json_array,
    "csv": _csv,
    "tsv": partial(_csv, delimiter="\t"),
    "parquet": _parquet,
}

"""The text in files of records: JSON lines and arrays, CSV, Parquet.

Each reader takes an open binary file, its name for messages, the text field, and the maximum bytes
of a record. It yields texts with one record in memory, and raises DataError naming the line. TSV
has no quoting: a quote is text, and fields contain neither tabs nor line ends.
"""

import codecs
import csv
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

from nanonormuon.errors import DataError
from nanonormuon.runtime.packages import need

# bytes; parsing a record can take 28 times as much memory (a list of [])
RECORD_LIMIT = 24 << 20
PAGE = 24  # maximum memory of a page of Parquet, in records
DAMAGE = (ValueError, LookupError, ArithmeticError, RecursionError)  # from a damaged file
DEEPEST = 1000  # maximum nesting in a JSON array


def _too_long(where: str, limit: int) -> DataError:
    more = "prepare --max-record MB allows more, for about 30 times as much memory"
    return DataError(f"{where}: a record of more than {limit / (1 << 20):g} MB; {more}")


def _no_text(where: str, text_field: str, found: Any) -> DataError:
    hint = "name another with --text-field"
    return DataError(f"{where}: expected text in {text_field!r}, found {str(found)[:200]}; {hint}")


def _lines(file: Any, name: str, limit: int) -> Iterator[bytes]:
    for number, line in enumerate(iter(partial(file.readline, limit), b""), 1):
        if len(line) == limit:
            raise _too_long(f"{name}:{number}", limit)
        yield line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _json_lines(file: Any, name: str, text_field: str, limit: int) -> Iterator[bytes]:
    for number, line in enumerate(_lines(file, name, limit), 1):
        where = f"{name}:{number}"
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: expected a JSON record: {str(error)[:200]}") from None
            yield _field(record, text_field, where)


def _json_array(file: Any, name: str, text_field: str, limit: int) -> Iterator[bytes]:
    # ijson's faster C backend changes lone surrogates, and deep nesting exhausts its memory
    parser = need("ijson.backends.python", f"{name}: a JSON array")
    errors = (need("ijson", name).JSONError, *DAMAGE)
    number, left = 0, limit

    def read(size: int) -> bytes:
        nonlocal left
        left -= size
        return file.read(size) if left >= 0 else b""  # an item is too long: pretend the file ends

    def shallow(events: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        depth = 0
        for event, value in events:
            depth += event.startswith("start_") - event.startswith("end_")
            if depth > DEEPEST:  # time and memory grow with the square of the depth
                raise ValueError(f"nested more than {DEEPEST} deep")
            yield event, value

    if file.peek(3).startswith(codecs.BOM_UTF8):
        file.read(3)
    try:
        events = parser.basic_parse(SimpleNamespace(read=read))
        for record in parser.items(parser.parse(shallow(events)), "item"):
            number, left = number + 1, limit
            yield _field(record, text_field, f"{name}: item {number}")
    except DataError:
        raise
    except errors as error:
        where = f"{name}: after item {number}"
        if left < 0:
            raise _too_long(where, limit) from None
        problem = re.sub(r"'(.{20}).*'", r"'\1...'", str(error))  # may quote a very long number
        raise DataError(f"{where}: invalid JSON: {problem[:200]}") from None


def _field(record: Any, text_field: str, where: str) -> bytes:
    """Return the UTF-8 text of a record, a string or an object with a text field; null is empty."""
    if isinstance(record, dict):
        _column([*record], text_field, where)  # which refuses a record without it
        record = record[text_field]
    if record is None:
        return b""
    if not isinstance(record, str):
        raise _no_text(where, text_field, type(record).__name__)
    return record.encode("utf-8", "surrogatepass")


def _csv(
    file: Any, name: str, text_field: str, limit: int, delimiter: str = ","
) -> Iterator[bytes]:
    csv.field_size_limit(limit)
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    left = limit

    def decoded() -> Iterator[str]:
        nonlocal left
        for line in _lines(file, name, limit):
            if (left := left - len(line)) < 0:  # a quoted field may span many lines
                raise _too_long(f"{name}:{rows.line_num}", limit)
            yield line.decode()

    rows = csv.reader(decoded(), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        header = next(rows, [])
        column = _column(header, text_field, name) if header else 0
        for row in rows:
            left = limit
            if row and len(row) != len(header):
                raise csv.Error(f"expected {len(header)} columns, found {len(row)}")
            if row:
                yield row[column].encode()
    except csv.Error as error:
        raise DataError(f"{name}:{rows.line_num}: {error}") from None
    except UnicodeDecodeError as error:  # in the line after the last one counted
        raise DataError(f"{name}:{rows.line_num + 1}: {error}") from None


def _column(names: list[str], text_field: str, name: str) -> int:
    """Return the index of the only column or field of this name. Raises DataError."""
    if (count := names.count(text_field)) > 1:
        raise DataError(f"{name}: {count} columns are {text_field!r}; rename all but one")
    if not count:
        raise _no_text(name, text_field, f"only {', '.join(names)}" if any(names) else "none")
    return names.index(text_field)


def _parquet(file: Any, name: str, text_field: str, limit: int) -> Iterator[bytes]:
    parquet, pyarrow = need("pyarrow.parquet", f"{name}: Parquet"), need("pyarrow", name)
    row = 0
    try:
        # buffered, so that a column chunk is not read at once
        table = parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        column = table.schema_arrow.field(_column(table.schema_arrow.names, text_field, name))
        kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
        if str(kind) not in ("string", "large_string", "string_view", "null"):
            raise _no_text(name, text_field, column.type)
        for group in range(table.num_row_groups):
            largest = 1
            for packed, size in _pages(file, table.metadata.row_group(group), text_field):
                largest = max(largest, size)
                if (needed := packed + 2 * size) > PAGE * limit:
                    what = f"{name}: row group {group}: a page of {size >> 20} MB of text"
                    more = f"prepare --max-record {-(-needed // (PAGE << 20))} allows it"
                    raise DataError(f"{what}; {more}")
            rows = max(1, min(128, 2 * limit // largest))  # a row may fill a page
            for batch in table.iter_batches(rows, [group], [text_field], use_threads=False):
                for value in batch.column(0).cast(kind):
                    row += 1
                    if value.is_valid:
                        if (text := value.as_buffer()).size > limit:
                            raise _too_long(f"{name}: row {row}", limit)
                        str(text, "utf-8")  # pyarrow does not check it
                        yield text.to_pybytes()
    except DataError:
        raise
    except (pyarrow.ArrowException, *DAMAGE) as error:
        raise DataError(f"{name}: near row {row}: damaged Parquet: {str(error)[:200]}") from None


def _pages(file: Any, group: Any, text_field: str) -> Iterator[tuple[int, int]]:
    """Yield the compressed and uncompressed bytes of each page of a column from its header
    (PageHeader in parquet.thrift): a page is decompressed whole, and the footer lacks its size."""
    for chunk in map(group.column, range(group.num_columns)):
        if chunk.path_in_schema == text_field:
            at = chunk.dictionary_page_offset or chunk.data_page_offset
            end = at + chunk.total_compressed_size
            while at < end:
                file.seek(at)
                header = _thrift(file)
                yield header[3], header[2]
                at = file.tell() + header[3]


def _thrift(file: Any) -> dict[int, int]:
    """Read a struct in Thrift's compact protocol: field id -> value of its integer fields. Raises
    LookupError or ArithmeticError if it is damaged."""

    def number() -> int:
        total = 0
        for shift in range(0, 70, 7):
            byte = file.read(1)[0]
            total |= (byte & 127) << shift
            if byte < 128:
                return total
        raise OverflowError("a number of more than ten bytes")

    found: dict[int, int] = {}
    field = 0
    while kind := file.read(1)[0]:
        field = field + (kind >> 4) if kind >> 4 else number() >> 1
        kind &= 15
        if kind in (4, 5, 6):  # an integer, with its sign in the last bit
            found[field] = number() >> 1
        elif kind == 8:  # bytes
            file.seek(number(), 1)
        elif kind == 12:
            _thrift(file)
        elif kind not in (1, 2):  # true, false
            raise LookupError(f"a field of kind {kind}")
    return found


READ: dict[str, Callable[[Any, str, str, int], Iterator[bytes]]] = {
    "lines": _json_lines,
    "array": _json_array,
    "csv": _csv,
    "tsv": partial(_csv, delimiter="\t"),
    "parquet": _parquet,
}

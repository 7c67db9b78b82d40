"""Documents from files of any format, one by one.

    file, directory, pattern, open file -> decompressed -> text | JSON | CSV | Parquet -> documents

A file's suffix gives its format; where it does not, the first bytes do. Files are read as streams:
a document of more than LARGE bytes is cut at paragraph ends, so a few times LARGE fits in memory.
"""

import codecs
import difflib
import glob
import gzip
import io
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nanonormuon.errors import DataError
from nanonormuon.runtime.packages import need
from nanonormuon.storage.files import open_regular
from nanonormuon.text import formats

log = logging.getLogger(__name__)

# Suffixes that a walk through a directory takes for text; a file named by the user may have any.
TEXT = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".org", ".html", ".css", ".xml", ".toml", ".yaml"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts"),
    *(".sh", ".sql", ".lua", ".rb", ".jl", ".r", ".yml"),
)
RECORDS = {
    ".jsonl": "lines", ".ndjson": "lines", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
PACKED = (".gz", ".zst")
LARGE = 16 << 20  # bytes; a longer document is cut into parts
PART = 1 << 20  # bytes; a part has one to two times this
PACKED_PARQUET_LIMIT = 128 << 20  # bytes; such a file is held in memory
PEEK = 1 << 16  # bytes that a format is recognised by
SHOWN = 8  # kinds of files that the log names
BAD_SHARE = 0.001  # of a text file's bytes may be invalid UTF-8
_PARAGRAPH = re.compile(rb"\n[ \t\r]*\n+")

Source = str | Path | IO[bytes]


@dataclass(frozen=True)
class Document:
    """A text to be trained on; `source` is the index of its source, `name` is for messages."""

    name: str
    source: int
    data: bytes


class NotText(DataError):
    """A file is not text; a walk skips it."""


def documents(
    sources: list[Source],
    skip: Path | None = None,
    text_field: str = "text",
    separator: bytes = b"",
    log_passed: bool = False,
    skip_bad: bool = False,
    max_record: int = formats.RECORD_LIMIT,
    advise: bool = True,
) -> Iterator[Document]:
    """The documents of all sources, in order; blank ones are left out.

    A source is a file, a directory (walked in name order, without the directory `skip`), a pattern
    like "notes/**/*.md", or an open binary file, which is rewound. A text file is a document, or
    one between each two `separator`s; records, of at most `max_record` bytes, give the document in
    their field `text_field`. A file that is named must be text; a walk passes over hidden, binary
    and empty ones. A file that cannot be read ends the reading, or with `skip_bad` itself alone.
    With `log_passed` the log says what was read of a directory, and what was not. Raises DataError,
    which names the options of `prepare` that help if `advise`.
    """
    for index, source in enumerate(sources):
        walked = isinstance(source, str | Path) and Path(source).is_dir()
        read, passed = Tally(), Tally()
        for file in _find(source, skip, passed):
            name = str(file) if isinstance(file, Path) else "standard input"
            taken = 0
            try:
                for text in _texts(file, name, text_field, separator, max_record):
                    taken += 1
                    if text.strip():
                        yield Document(name, index, text)
                read.add(_suffix(Path(name)), name)
            except DataError as error:
                problem = f"{error}{getattr(error, 'advice', '') if advise else ''}"
                if walked and isinstance(error, NotText):
                    passed.add("not text", name)
                elif not skip_bad:
                    hint = " (prepare --skip-bad goes on without it)" if walked and advise else ""
                    raise type(error)(f"{problem}{hint}") from None
                elif log_passed:
                    passed.add("bad", name)
                    log.warning("prepare: skipped from document %d on: %s", taken + 1, problem)
        if walked and log_passed:
            log.info("prepare: %s: read %s; passed over %s", source, read, passed)


class Tally(dict[str, tuple[int, str]]):
    """How many files there are of each kind, and the first of them."""

    def add(self, kind: str, name: str) -> None:
        count, first = self.get(kind, (0, name))
        self[kind] = count + 1, first

    def __str__(self) -> str:
        shown = sorted(self.items(), key=lambda item: -item[1][0])
        parts = [f"{count} {kind} ({first})" for kind, (count, first) in shown[:SHOWN]]
        rest = sum(count for _, (count, _) in shown[SHOWN:])
        return ", ".join([*parts, *([f"{rest} others"] if rest else [])]) or "nothing"


def _find(source: Source, skip: Path | None, passed: Tally) -> Sequence[Path | IO[bytes]]:
    """The files of a source; adds what a walk passes over."""
    if not isinstance(source, str | Path):
        return [source]
    path = Path(source)
    if not str(source):
        raise DataError("a source without a name; . is the working directory")
    if path.is_dir():
        return walk(path, skip, passed)
    if path.exists():
        return [path]
    if glob.has_magic(str(source)):
        found = {Path(name) for name in glob.glob(str(source), recursive=True)}
        own = os.path.realpath(skip) if skip else None  # a repeated run leaves out its own output
        found = {p for p in found if not (own and Path(os.path.realpath(p)).is_relative_to(own))}
        if files := sorted(filter(Path.is_file, found)):
            return files
        raise DataError(f"{source}: the pattern matches no file (directories are named without *)")
    if path.is_symlink():
        raise DataError(f"{path}: a link that leads to no file")
    there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, 1)
    hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
    raise DataError(f"{path}: no such file or directory{hint}")


def walk(root: Path, skip: Path | None, passed: Tally) -> list[Path]:
    """Visible, non-empty files of known formats below a directory, in name order on every system;
    adds the others. Links to directories are not followed. Raises DataError."""

    def fail(error: OSError) -> None:
        raise DataError(
            f"{error.filename}: cannot be read: {error.strerror}; allow it or name other sources"
        )

    def problem(path: Path) -> str:
        """Why a path is passed over; "" if it is not."""
        if path.name.startswith("."):
            return "hidden"
        if path.is_dir():
            own = skip is not None and skip.exists() and skip.samefile(path)
            return "the output" if own else "linked directories" * path.is_symlink()
        if (suffix := _suffix(path)) not in known:
            return f"of no known format, {suffix or 'no suffix'}"
        if not path.is_file():
            return "no regular file"
        return "" if path.stat().st_size else "empty"

    files, known = [], {*TEXT, *RECORDS, ".json"}
    for folder, below, names in os.walk(root, onerror=fail):
        paths = [Path(folder, name) for name in sorted((*below, *names))]
        below.clear()
        for path in paths:
            if reason := problem(path):
                passed.add(reason, str(path))
            elif path.is_dir():
                below.append(path.name)
            else:
                files.append(path)
    return sorted(files, key=lambda path: path.parts)


def _suffix(path: Path) -> str:
    """The suffix that names a format: .csv of x.csv.gz."""
    return (path.with_suffix("") if path.suffix.lower() in PACKED else path).suffix.lower()


# --------------------------------------------------------------------------- one file's documents


def _texts(
    file: Path | IO[bytes], name: str, text_field: str, separator: bytes, max_record: int
) -> Iterator[bytes]:
    """The documents of one file, whatever its format; DataError names what is wrong where."""
    try:
        with _opened(file) as raw:
            content = _unpacked(raw, name)
            kind = _kind(content, name)
            if kind == "text":
                yield from _parts(_checked(content, name), separator)
                return
            if kind == "parquet" and content is not raw:  # it is read at random
                content = io.BytesIO(content.read(PACKED_PARQUET_LIMIT + 1))
                if content.getbuffer().nbytes > PACKED_PARQUET_LIMIT:
                    raise DataError(f"{name}: Parquet is compressed in itself; unpack this file")
            for text in formats.READ[kind](content, name, text_field, max_record):
                yield from _cut(text, 2 * PART) if len(text) > LARGE else [text]
    except (EOFError, zlib.error, OSError) as error:
        if reason := getattr(error, "strerror", None):  # the system's; libraries set none
            raise DataError(f"{name}: cannot be read: {reason}") from None
        raise DataError(f"{name}: damaged compressed file: {error}; copy it again") from None


def _opened(file: Path | IO[bytes]) -> Any:
    if isinstance(file, Path):
        try:
            return open_regular(file, PEEK)
        except ValueError:  # a pipe could not be read three times
            raise NotText(f"{file}: not a regular file; pipe it in with -") from None
    file.seek(0)
    return io.BufferedReader(io.FileIO(file.fileno(), closefd=False), PEEK)


def _unpacked(raw: IO[bytes], name: str) -> Any:
    """The file itself, or what is compressed in it, by its first bytes."""
    start = raw.peek(4)[:4]  # type: ignore[attr-defined]
    if start[:2] == b"\x1f\x8b":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)  # type: ignore[arg-type]
    # a frame, or one to be skipped: 0x184D2A50 to 0x184D2A5F (RFC 8878, 3.1.2)
    if start == b"\x28\xb5\x2f\xfd" or (start[1:] == b"\x2a\x4d\x18" and start[0] >> 4 == 5):
        pyarrow = need("pyarrow", f"{name}: zstd")
        packed = pyarrow.PythonFile(raw, mode="r")
        return io.BufferedReader(pyarrow.CompressedInputStream(packed, "zstd"), 1 << 20)
    if name.lower().endswith(PACKED):
        raise NotText(
            f"{name}: gzip or zstd expected by its name, found {start!r}; rename it or leave it out"
        )
    return raw


def _kind(file: Any, name: str) -> str:
    """text, lines (a JSON value each), array (of JSON values), csv, tsv or parquet."""
    suffix = _suffix(Path(name))
    if suffix in TEXT:
        return "text"
    if suffix in RECORDS:
        return RECORDS[suffix]
    start = file.peek(PEEK)
    if start.startswith(b"PAR1"):
        return "parquet"
    start = start.removeprefix(codecs.BOM_UTF8).lstrip()
    if re.match(rb"\[" if suffix == ".json" else rb'\[\s*["{]', start):
        return "array"
    if start.startswith(b"{"):
        line, end, _ = start.partition(b"\n")
        try:
            json.loads(line)
            return "lines"
        except (ValueError, RecursionError):
            if not end and len(start) > 1 << 12:  # a first record longer than what was peeked at
                return "lines"
    if suffix == ".json":
        raise NotText(f"{name}: a JSON array of records, or one record per line, expected")
    return "text"


# --------------------------------------------------------------------------------------- plain text


def _checked(file: Any, name: str) -> Iterator[bytes]:
    """Blocks of a file without its byte order mark. Raises NotText or, behind the first block,
    DataError for a NUL or for too many bytes that are not UTF-8."""
    done = bad = 0
    first = None  # offset of the first byte that is not UTF-8
    while block := file.read(LARGE):
        nul = block.find(0)
        if nul < 0:
            try:
                block.decode()
            except UnicodeDecodeError as error:
                first = done + error.start if first is None else first
                bad += len(block) - len(block.decode("utf-8", "ignore").encode())
        if nul >= 0 or bad > BAD_SHARE * (done + len(block)):
            at = first if nul < 0 else done + nul
            found = f"byte 0x{block[at - done]:02x}" if at >= done else f"{bad} other bytes"
            raise (DataError if done else NotText)(
                f"{name}: offset {at}: UTF-8 text expected, {found} found;"
                " convert the file or leave it out"
            )
        yield block if done else block.removeprefix(codecs.BOM_UTF8)
        done += len(block)


def _parts(blocks: Iterator[bytes], separator: bytes) -> Iterator[bytes]:
    """Documents of a stream: the text between separators, cut where it is longer than LARGE. The
    result does not depend on how the stream is divided into blocks."""
    buffer, long = b"", False
    for block in blocks:
        buffer += block
        if separator:
            *whole, buffer = buffer.split(separator)
            for document in whole:
                yield from _cut(document, 2 * PART) if long or len(document) > LARGE else [document]
                long = False
        if long := long or len(buffer) > LARGE:
            *parts, buffer = _cut(buffer, 2 * PART + len(separator))
            yield from parts
    yield from _cut(buffer, 2 * PART) if long else [buffer]


def _cut(text: bytes, keep: int) -> list[bytes]:
    """Parts of PART to 2 PART bytes from the start of a text, and the rest of at most `keep`. A
    part ends with a paragraph; failing that, with a line, a word, a character."""
    parts, start = [], 0
    while len(text) - start > keep:
        window = text[start + PART : start + 2 * PART]
        if paragraph := _PARAGRAPH.search(window):
            end = paragraph.end()
        else:
            end = window.rfind(b"\n") + 1 or window.rfind(b" ") + 1 or len(window)
        end += start + PART
        while text[end] & 0xC0 == 0x80 and end > start + 2 * PART - 4:
            end -= 1
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]

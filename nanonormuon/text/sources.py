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
PACKED_PARQUET_LIMIT = 256 << 20  # bytes
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
) -> Iterator[Document]:
    """The documents of all sources, in order; blank ones are left out.

    A source is a file, a directory (walked in name order, without the directory `skip`), a pattern
    like "notes/**/*.md", or an open binary file, which is rewound. A text file is a document, or
    one between each two `separator`s; records give the document in their field `text_field`. A file
    that is named must be text; a walk passes over hidden, binary and empty ones, and with
    `log_passed` the log says how many. Raises DataError.
    """
    for index, source in enumerate(sources):
        walked = isinstance(source, str | Path) and Path(source).is_dir()
        passed = []
        for file in _find(source, skip):
            name = str(file) if isinstance(file, Path) else "standard input"
            try:
                for text in _texts(file, name, text_field, separator):
                    if text.strip():
                        yield Document(name, index, text)
            except NotText:
                if not walked:
                    raise
                passed.append(name)
        if passed and log_passed:
            log.info(
                "prepare: %s: passed over %d names, no text or linked directories, the first is %s",
                source, len(passed), passed[0],
            )  # fmt: skip


def _find(source: Source, skip: Path | None) -> Sequence[Path | IO[bytes]]:
    """The files of a source."""
    if not isinstance(source, str | Path):
        return [source]
    path = Path(source)
    if path.is_dir():
        return walk(path, skip)
    if path.exists():
        return [path]
    if glob.has_magic(str(source)):
        found = {Path(name) for name in glob.glob(str(source), recursive=True)}
        own = skip.resolve() if skip else None  # a repeated run does not take its own output
        found = {p for p in found if not (own and p.resolve().is_relative_to(own))}
        if files := sorted(filter(Path.is_file, found)):
            return files
        raise DataError(f"{source}: the pattern matches no file (directories are named without *)")
    there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, 1)
    hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
    raise DataError(f"{path}: no such file or directory{hint}")


def walk(root: Path, skip: Path | None = None) -> list[Path]:
    """Visible, non-empty files of known formats below a directory, in name order on every
    system, and links to directories, which are not followed. Raises DataError."""

    def fail(error: OSError) -> None:
        raise DataError(
            f"{error.filename}: cannot be read: {error.strerror}; allow it or name other sources"
        )

    def is_own(path: Path) -> bool:
        return skip is not None and skip.exists() and skip.samefile(path)

    files, known = [], {*TEXT, *RECORDS, ".json"}
    for folder, below, names in os.walk(root, onerror=fail):
        below[:] = [n for n in below if not (n.startswith(".") or is_own(Path(folder, n)))]
        files += [path for name in below if (path := Path(folder, name)).is_symlink()]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if _suffix(path) in known and path.is_file() and path.stat().st_size:
                files.append(path)
    return sorted(files, key=lambda path: path.parts)


def _suffix(path: Path) -> str:
    """The suffix that names a format: .csv of x.csv.gz."""
    return (path.with_suffix("") if path.suffix.lower() in PACKED else path).suffix.lower()


# --------------------------------------------------------------------------- one file's documents


def _texts(file: Path | IO[bytes], name: str, text_field: str, separator: bytes) -> Iterator[bytes]:
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
            for text in formats.READ[kind](content, name, text_field):
                yield from _cut(text, 2 * PART) if len(text) > LARGE else [text]
    except (EOFError, zlib.error, OSError) as error:
        if reason := getattr(error, "strerror", None):  # the system's; libraries set none
            raise DataError(f"{name}: cannot be read: {reason}") from None
        raise DataError(f"{name}: damaged compressed file: {error}; copy it again") from None


def _opened(file: Path | IO[bytes]) -> Any:
    if isinstance(file, Path):
        if file.exists() and not file.is_file():  # a pipe could not be read three times
            raise NotText(f"{file}: not a regular file; pipe it in with -")
        return file.open("rb")
    file.seek(0)
    return io.BufferedReader(io.FileIO(file.fileno(), closefd=False))


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
    start = file.peek(1 << 16)
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
        except ValueError:
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

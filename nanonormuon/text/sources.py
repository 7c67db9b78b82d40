"""Reads documents from files of any format.

    file, directory, pattern, open file -> decompressed -> text | JSON | CSV | Parquet -> documents

A file's format follows from its suffix or else its first bytes. Files are read as streams, and
documents of more than LARGE bytes are cut at paragraph ends, so memory is a few times LARGE.
"""

import codecs
import glob
import gzip
import io
import json
import logging
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nanonormuon.errors import DataError
from nanonormuon.runtime.packages import need
from nanonormuon.storage.files import open_regular
from nanonormuon.text import formats

log = logging.getLogger(__name__)

# Suffixes of text files in a directory; a file that the user names may have any suffix.
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
PACKED_PARQUET_LIMIT = 128 << 20  # bytes of a compressed Parquet file, held in memory
PEEK = 1 << 16  # bytes read to recognise a format
SHOWN = 8  # kinds of files listed in the log
BAD_SHARE = 0.001  # maximum share of invalid UTF-8 in a text file
_PARAGRAPH = re.compile(rb"\n[ \t\r]*\n+")

Source = str | Path | IO[bytes]


@dataclass(frozen=True)
class Document:
    """A text to train on. source: index of its source; name: for messages."""

    name: str
    source: int
    data: bytes


class NotText(DataError):
    """A file is not text; in a directory it is skipped."""


def documents(
    sources: list[Source],
    skip: Path | None = None,
    text_field: str = "text",
    separator: bytes = b"",
    log_passed: bool = False,
    skip_bad: bool = False,
    max_record: int = formats.RECORD_LIMIT,
) -> Iterator[Document]:
    """Yield the documents of all sources in order, without blank ones.

    A source is a file, a directory (read in name order, without the directory `skip`), a pattern
    like "notes/**/*.md", or an open binary file, which is rewound. A text file is one document, or
    several between `separator`s; a record, of at most `max_record` bytes, has its document in the
    field `text_field`. Hidden, binary and empty files in a directory are skipped. A bad file raises
    DataError or, with `skip_bad`, is skipped. log_passed: log what was read of a directory and what
    was skipped.
    """
    for index, source in enumerate(sources):
        walked = isinstance(source, str | Path) and Path(source).is_dir()
        read, passed = defaultdict(list), defaultdict(list)  # names of files, by kind
        for file in _find(source, skip, passed):
            name = str(file) if isinstance(file, Path) else "standard input"
            try:
                for text in _texts(file, name, text_field, separator, max_record):
                    if text.strip():
                        yield Document(name, index, text)
                read[_suffix(Path(name))].append(name)
            except DataError as error:
                if walked and isinstance(error, NotText):
                    passed["not text"].append(name)
                elif not skip_bad:
                    hint = " (prepare --skip-bad skips it)" if walked else ""
                    raise type(error)(f"{error}{hint}") from None
                elif log_passed:
                    passed["bad"].append(name)
                    log.warning("prepare: skipped (earlier documents are kept): %s", error)
        if walked and log_passed:
            log.info("prepare: %s: read %s; skipped %s", source, _listed(read), _listed(passed))


def _listed(kinds: dict[str, list[str]]) -> str:
    """Describe files by kind: their number and the first of them."""
    shown = sorted(kinds.items(), key=lambda item: -len(item[1]))
    parts = [f"{len(names)} {kind} ({names[0]})" for kind, names in shown[:SHOWN]]
    rest = sum(len(names) for _, names in shown[SHOWN:])
    return ", ".join(parts + [f"{rest} others"] * (rest > 0)) or "nothing"


def _find(
    source: Source, skip: Path | None, passed: dict[str, list[str]]
) -> Iterable[Path | IO[bytes]]:
    """Return the files of a source, and add others in a directory to `passed`. Raises DataError."""
    if not isinstance(source, str | Path):
        return [source]
    path = Path(source)
    if not str(source):
        raise DataError("a source with an empty name; . is the working directory")
    if path.is_dir():
        return walk(path, skip, passed)
    if path.exists():
        return [path]
    if glob.has_magic(str(source)):
        found = {Path(name) for name in glob.glob(str(source), recursive=True)}
        own = os.path.realpath(skip) if skip else None  # leave out an earlier run's output
        found = {p for p in found if not (own and Path(os.path.realpath(p)).is_relative_to(own))}
        if files := sorted(filter(Path.is_file, found), key=lambda path: path.parts):
            return files
        raise DataError(f"{source}: the pattern matches no file (directories are named without *)")
    raise DataError(f"{path}: no such file or directory, or a broken link")


def walk(root: Path, skip: Path | None, passed: dict[str, list[str]]) -> Iterator[Path]:
    """Yield visible, non-empty files of known formats below a directory, in name order on every
    system, and add others to `passed`. Does not follow links to directories. Raises DataError."""
    left = [root]
    while left:
        path = left.pop()
        if path != root and (reason := _unwanted(path, skip)):
            passed[reason].append(str(path))
        elif path.is_dir():
            try:
                left += sorted(path.iterdir(), key=lambda path: path.name, reverse=True)
            except OSError as error:
                hint = "change its permissions or name other sources"
                raise DataError(f"{path}: cannot be read: {error.strerror}; {hint}") from None
        else:
            yield path


def _unwanted(path: Path, skip: Path | None) -> str:
    """Return why a walk passes over a path, "" if it does not."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        own = skip is not None and skip.exists() and skip.samefile(path)
        return "the output" if own else "linked directories" * path.is_symlink()
    if (suffix := _suffix(path)) not in (*TEXT, *RECORDS, ".json"):
        return f"of no known format, {suffix or 'no suffix'}"
    if not path.is_file():
        return "no regular file"
    return "" if path.stat().st_size else "empty"


def _suffix(path: Path) -> str:
    """Return the suffix that names a format: .csv for x.csv.gz."""
    return (path.with_suffix("") if path.suffix.lower() in PACKED else path).suffix.lower()


# --------------------------------------------------------------------------- one file's documents


def _texts(
    file: Path | IO[bytes], name: str, text_field: str, separator: bytes, max_record: int
) -> Iterator[bytes]:
    """Yield the documents of one file in any format. Raises DataError."""
    try:
        with _opened(file) as raw:
            content = _unpacked(raw, name)
            kind = _kind(content, name)
            if kind == "text":
                yield from _parts(_checked(content, name), separator)
                return
            if kind == "parquet" and content is not raw:  # Parquet needs random access
                content = io.BytesIO(content.read(PACKED_PARQUET_LIMIT + 1))
                if content.getbuffer().nbytes > PACKED_PARQUET_LIMIT:
                    raise DataError(f"{name}: too large a compressed Parquet file; decompress it")
            for text in formats.READ[kind](content, name, text_field, max_record):
                yield from _parts(iter([text]), b"")
    except (EOFError, zlib.error, OSError) as error:
        if reason := getattr(error, "strerror", None):  # from the system, not from a library
            raise DataError(f"{name}: cannot be read: {reason}") from None
        raise DataError(f"{name}: damaged compressed file: {error}; copy it again") from None


def _opened(file: Path | IO[bytes]) -> Any:
    if isinstance(file, Path):
        try:
            return open_regular(file, PEEK)
        except DataError as error:  # a pipe could not be read three times
            raise NotText(f"{error}; pipe it in with -") from None
    file.seek(0)
    return io.BufferedReader(io.FileIO(file.fileno(), closefd=False), PEEK)


def _unpacked(raw: IO[bytes], name: str) -> Any:
    """Return the file, decompressed if its first bytes are gzip's or zstd's."""
    start = raw.peek(4)[:4]  # type: ignore[attr-defined]
    if start[:2] == b"\x1f\x8b":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)  # type: ignore[arg-type]
    # a zstd frame, or a skippable frame: 0x184D2A50 to 0x184D2A5F (RFC 8878, 3.1.2)
    if start == b"\x28\xb5\x2f\xfd" or (start[1:] == b"\x2a\x4d\x18" and start[0] >> 4 == 5):
        pyarrow = need("pyarrow", f"{name}: zstd")
        packed = pyarrow.PythonFile(raw, mode="r")
        return io.BufferedReader(pyarrow.CompressedInputStream(packed, "zstd"), 1 << 20)
    if name.lower().endswith(PACKED):
        found = f"found {start!r}; rename it or leave it out"
        raise NotText(f"{name}: expected gzip or zstd by its name, {found}")
    return raw


def _kind(file: Any, name: str) -> str:
    """Recognise a format: text, lines (of JSON), array (JSON), csv, tsv or parquet."""
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
            if not end and len(start) > 1 << 12:  # the first record may be longer than PEEK
                return "lines"
    if suffix == ".json":
        raise NotText(f"{name}: expected a JSON array of records or one record per line")
    return "text"


# --------------------------------------------------------------------------------------- plain text


def _checked(file: Any, name: str) -> Iterator[bytes]:
    """Yield blocks of a file without its byte order mark. Raises NotText or, after the first block,
    DataError for a NUL or too much invalid UTF-8."""
    done = bad = 0
    while block := file.read(LARGE):
        at = block.find(0)
        try:
            block.decode()
        except UnicodeDecodeError as error:
            at = error.start if at < 0 else at
            bad += len(block) - len(block.decode(errors="ignore").encode())
        if 0 in block or bad > BAD_SHARE * (done + len(block)):
            what = f"expected UTF-8 text, found byte 0x{block[at]:02x}"
            problem = f"{name}: offset {done + at}: {what}; convert the file or leave it out"
            raise (DataError if done else NotText)(problem)
        yield block if done else block.removeprefix(codecs.BOM_UTF8)
        done += len(block)


def _parts(blocks: Iterator[bytes], separator: bytes) -> Iterator[bytes]:
    """Split a stream into documents at separators, and cut those longer than LARGE, independently
    of how the stream is divided into blocks."""
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
    """Cut a text into parts of PART to 2 PART bytes and a rest of at most `keep`. Parts end at a
    paragraph or, if there is none, at a line, a word or a character."""
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

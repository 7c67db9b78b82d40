"""Proves: the same texts come out of every format, packed or not, named or recognised; cutting and
separating a stream loses no byte and does not depend on how it is read; what is wrong is named with
file and line; memory stays small whatever the size of a file.
"""

import csv
import gzip
import io
import json
import logging
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanonormuon.cli import app as cli
from nanonormuon.errors import DataError, MissingPackage
from nanonormuon.text import sources
from nanonormuon.text.prepare import prepare
from nanonormuon.text.sources import documents

TEXTS = ["plain", 'with "quotes", commas\nand lines\r\n', "é字\U0001f469", "\ttabs\t", "x" * 70_000]


def as_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)).encode()


def as_array(texts: list[str]) -> bytes:
    return json.dumps([{"text": t, "n": [i]} for i, t in enumerate(texts)], indent=1).encode()


def as_strings(texts: list[str]) -> bytes:
    return json.dumps(texts, ensure_ascii=False).encode()


def as_csv(texts: list[str]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerows([["id", "text"], *([i, t] for i, t in enumerate(texts))])
    return b"\xef\xbb\xbf" + file.getvalue().encode()


def as_parquet(texts: list[str]) -> bytes:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    file = io.BytesIO()
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    parquet.write_table(table, file, row_group_size=2)
    return file.getvalue()


def as_zstd(content: bytes) -> bytes:
    """Two frames, as `cat a.zst b.zst` makes them."""
    pyarrow, half = pytest.importorskip("pyarrow"), len(content) // 2
    parts = (content[:half], content[half:])
    return b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in parts)


FORMATS: dict[str, Callable[[list[str]], bytes]] = {
    "a.jsonl": as_lines,
    "a.ndjson": as_lines,
    "lines.json": as_lines,
    "a.json": as_array,
    "strings.json": as_strings,
    "a.csv": as_csv,
    "a.parquet": as_parquet,
    "nameless-lines": as_lines,
    "nameless-array": as_array,
    "nameless-parquet": as_parquet,
}


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_gives_the_same_texts(name: str, packed: str, tmp_path: Path) -> None:
    content = FORMATS[name](TEXTS)
    pack = {"": bytes, ".gz": gzip.compress, ".zst": as_zstd}[packed]
    path = tmp_path / (name + packed)
    path.write_bytes(pack(content))
    assert [d.data.decode() for d in documents([path])] == TEXTS
    if packed:  # by content: the name need not say it
        path = path.rename(tmp_path / name)
        assert [d.data.decode() for d in documents([path])] == TEXTS


@pytest.mark.parametrize("pack", [bytes, gzip.compress, as_zstd])
def test_plain_text_is_one_document_byte_for_byte(pack: Any, tmp_path: Path) -> None:
    text = "[1] a list\r\n{not json}\n é ".encode() + b"\xff" + b"more" * 1000
    (tmp_path / "x.md").write_bytes(pack(text))
    assert [d.data for d in documents([tmp_path / "x.md"])] == [text]


def test_a_quote_is_text_in_tsv(tmp_path: Path) -> None:
    texts = ['"lone quote', "next", 'a ""b"" c', "é, 字"]
    rows = "".join(f"{i}\t{text}\r\n" for i, text in enumerate(texts))
    (tmp_path / "a.tsv").write_bytes(("\ufeffid\ttext\r\n" + rows).encode())
    assert [d.data.decode() for d in documents([tmp_path / "a.tsv"])] == texts


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\ufeff\n".encode())
    assert [d.data.decode() for d in documents([tmp_path / "a.txt"])] == ["one\ufeff\n"]


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: expected a regular file"):
        list(documents([tmp_path / "pipe"]))


@pytest.mark.parametrize(
    ("source", "says"),
    [("", "empty name"), ("/dev/zero", "a regular file"), ("loop.txt", "broken link")],
)
def test_sources_that_are_no_files(
    source: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    assert cli.main(["prepare", source, "--tokenizer", "byte", "--out", "out"]) == 3
    with pytest.raises(DataError, match=says):
        list(documents([source]))
    assert list(documents(["."])) == []  # a walk passes over both


def test_bad_files_are_skipped_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.csv").write_text("id,body\n1,x\n")
    (tmp_path / "c.jsonl").write_text('{"text": "two"}\n{"text": oops}\n{"text": "three"}\n')
    (tmp_path / "d.png").write_text("png")
    with pytest.raises(DataError, match=r"b\.csv: .*'text', found only id, body.*--skip-bad"):
        list(documents([tmp_path]))
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "x" * 99}))
    with pytest.raises(DataError, match=r"a record of more than .*--max-record"):
        list(documents([tmp_path / "long.jsonl"], max_record=50))
    (tmp_path / "long.jsonl").unlink()
    found = [d.data for d in documents([tmp_path], log_passed=True, skip_bad=True)]
    assert found == [b"one", b"two"]
    for part in ("kept.: .*b.csv: exp", "kept.: .*c.jsonl:2: ", "2 bad", "png"):
        assert re.search(part, caplog.text)
    with pytest.raises(DataError, match="no text found"):
        prepare([tmp_path / "b.csv"], tmp_path / "out", skip_bad=True)


def test_a_zstd_file_may_have_frames_to_be_skipped(tmp_path: Path) -> None:
    skipped = b"\x5a\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    long = b"\x50\x2a\x4d\x18" + (300_000).to_bytes(4, "little") + bytes(300_000)
    text, packed = b"text " * 99, as_zstd(b"text " * 99)
    for start in (skipped, skipped + skipped, long):
        (tmp_path / "a.txt").write_bytes(start + packed + skipped + packed + long)
        assert [d.data for d in documents([tmp_path / "a.txt"])] == [text + text]


def test_a_mixed_directory_a_pattern_and_an_open_file(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(as_lines(["two", "", None, "three"])))
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.csv").write_bytes(as_csv(["four", " \n"]))
    (tmp_path / "d.parquet").write_bytes(as_parquet(["five"]))
    (tmp_path / "package.json").write_text('{\n "name": "no records"\n}')
    (tmp_path / "e.txt.gz").touch()
    (tmp_path / "e.md.gz").write_text("not what the name says")
    (tmp_path / "f.txt").write_bytes("déjà vu".encode("latin-1"))
    (tmp_path / "g.txt").write_bytes(b"bin\0ary")
    found = [d.data.decode() for d in documents([tmp_path])]
    assert found == ["one", "two", "three", "four", "five"]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "h.txt").write_text("six")
    assert [d.data for d in documents([str(tmp_path / "**" / "[ah].txt")])] == [b"one", b"six"]
    with open(tmp_path / "b.jsonl.gz", "rb") as file:
        for _ in range(2):  # it is rewound
            assert [d.data for d in documents([file], text_field="text")] == [b"two", b"three"]


def test_files_come_in_name_order_where_paths_are_compared_without_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    for name in ("B.txt", "a.txt", "C.txt"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(Path, "__lt__", lambda a, b: str(a).lower() < str(b).lower())
    for source in (tmp_path, tmp_path / "*.txt"):
        assert [d.data for d in documents([source])] == [b"B.txt", b"C.txt", b"a.txt"]


def test_text_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": "y"}')
    assert [d.data for d in documents([tmp_path / "a.jsonl"], text_field="body")] == [b"x"]


def test_lone_surrogates_of_json_keep_their_bytes(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", '{"text": "a\\ud800b"}'), ("a.json", '["a\\ud800b"]')):
        (tmp_path / name).write_text(content)
        assert [d.data for d in documents([tmp_path / name])] == [b"a\xed\xa0\x80b"]


def test_a_byte_order_mark_before_an_array(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf["a", "b"] \n')
    assert [d.data for d in documents([tmp_path / "a.json"])] == [b"a", b"b"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": oops}\n', r"a\.jsonl:2: expected a JSON record"),
        ("a.jsonl", b'{"text": ""}\n\n{"body": 1, "n": 2}', r"l:3: .* found only body, n"),
        ("a.jsonl", b"{}", r"expected text in 'text', found none;"),
        ("a.csv", b'""\n', r"expected text in 'text', found none;"),
        ("a.jsonl", b'{"text": ["a"]}', r"a\.jsonl:1: expected text in 'text', found list"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl:1: expected a JSON record"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: expected a JSON record"),
        ("a.json", b'[{"text": "a"}, {"text": ]', r"a\.json: after item 1: invalid JSON: .*\]"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', r"a\.json: after item 1: invalid JSON: .*\{"),
        ("a.json", b'[{"text": "a"}', r"a\.json: after item 1: invalid JSON: Incomp"),
        ("a.json", b'["a"] ["b"]', r"a\.json: after item 1: invalid JSON: Addit"),
        ("a.json", b'["a"] x', r"a\.json: after item 1: invalid JSON: "),
        ("a.json", b'["a", "\xff"]', r"a\.json: after item \d: invalid JSON: 'utf-8'"),
        ("a.json", b'["a",' + b"[" * 100_000, r"a\.json: .*1000 deep"),
        ("a.json", b'[{"n": %s}]' % (b"9" * 100_000), r"item 0: invalid JSON: .{,50}\.\.' at 7$"),
        ("nameless", b'{"a":' * 100_000 + b"\n", r"nameless:1: expected a JSON record"),
        ("a.csv", b"text,id,text\na,1,b\n", r"a\.csv: 2 columns are 'text'"),
        ("a.txt.zst", as_zstd(b"text " * 99) + b"more", r"a\.txt\.zst: damaged compressed file"),
        ("a.json", b'{\n"text": "a"}', r"a\.json: expected a JSON array"),
        ("a.csv", b"id,body\n1,x\n", r"a\.csv: expected text in 'text', found only id, body"),
        ("a.csv", b"id,text\n1,x\n2\n", r"a\.csv:3: expected 2 columns, found 1"),
        ("a.csv", b'id,text\n1,"x\n', r"a\.csv:2: unexpected end of data"),
        ("a.csv", b"id,text\n1,\xff\n", r"a\.csv:2: 'utf-8'"),
        ("a.parquet", b"PAR1 and then nothing", r"a\.parquet: "),
        ("a.txt.gz", gzip.compress(b"a" * 1000, mtime=0)[:-9], r"a\.txt\.gz: damaged"),
        ("a.txt.gz", b"not packed", r"a\.txt\.gz: expected gzip or zstd by its name, found b"),
        ("a.ZST", b"", r"a\.ZST: expected gzip or zstd by its name"),
        ("a.txt", b"\x1f\x8b and no gzip", r"a\.txt: damaged compressed file"),
        ("a.txt", b"\x28\xb5\x2f\xfd and no zstd", r"a\.txt: damaged compressed file"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        list(documents([tmp_path / name]))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def column(*arrays: Any, **options: Any) -> bytes:
    """A Parquet file of columns that are all called text."""
    parquet, file = pytest.importorskip("pyarrow.parquet"), io.BytesIO()
    import pyarrow

    names = ["text"] * len(arrays)
    parquet.write_table(pyarrow.table(list(arrays), names=names), file, **options)
    return file.getvalue()


def test_parquet_that_expands_or_is_no_text(tmp_path: Path) -> None:
    """One value of 1 MB in 400 rows is read a few rows at a time."""
    pyarrow, path = pytest.importorskip("pyarrow"), tmp_path / "a.parquet"
    held = pyarrow.total_allocated_bytes()
    values = pyarrow.DictionaryArray.from_arrays([0] * 400, ["x" * (1 << 20)])
    path.write_bytes(column(values, compression="zstd", store_schema=False))
    assert path.stat().st_size < 10_000
    for number, document in enumerate(documents([path], max_record=1 << 20)):  # noqa: B007
        assert len(document.data) == 1 << 20 and pyarrow.total_allocated_bytes() - held < 9 << 20
    assert number == 399
    invalid = pyarrow.array([b"ok", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    two = column(pyarrow.array(["a"]), pyarrow.array(["b"]))
    numbers = column(pyarrow.array([[1]]))
    page = column(pyarrow.array(["x", "y" * (24 << 17)]), use_dictionary=False, compression="zstd")
    for content, says in (
        (column(invalid), "near row 2: .* byte 0xff"), (two, "2 columns are 'text'"),
        (numbers, "expected text in 'text', found list"),
        (column(), "expected text in 'text', found none;"),
        (page, "row group 0: a page of 3 MB of text; prepare --max-record 1 "),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"a\.parquet: {says}"):
            list(documents([path], max_record=1 << 17))


HOSTILE = [b"\0", b"\xff", b"9" * 5000, b"[" * 2000, b'{"text":', b'"', b"1e999999999", b",", b"-",
           b"\xef\xbb\xbf", b"PAR1", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\\ud800"]  # fmt: skip


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_mutated_files_end_in_documented_errors(packed: str, tmp_path: Path) -> None:
    seed = int(os.environ.get("FAULT_SEED", time.time_ns() % 10**6))
    print(f"FAULT_SEED={seed}")
    dice, pack = random.Random(seed), {"": bytes, ".gz": gzip.compress, ".zst": as_zstd}[packed]
    plain = {"a.txt": b"text\n" * 99, "a.md": b"# text", "a.tsv": b"text\tn\na\t1\n"}
    contents = plain | {name: make(["one", "two", "é" * 99]) for name, make in FORMATS.items()}
    for turn in range(5 * len(contents)):
        name = list(contents)[turn % len(contents)]
        content = bytearray(contents[name])
        if packed and turn % 3 == 0:
            content = bytearray(pack(bytes(content)))
        at, size = dice.randrange(len(content)), dice.choice([0, 1, 9, len(content)])
        content[at : at + size] = dice.choice([*HOSTILE, b"", dice.randbytes(9)])
        path = tmp_path / "in" / (name + packed)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if packed and turn % 3 == 0 else pack(bytes(content)))
        for source in (path, path.parent):
            try:
                list(documents([source]))
            except DataError as error:
                assert str(path) in str(error) and len(str(error)) < 900
        list(documents([path.parent], skip_bad=True))
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.parquet", b"", "a.parquet: row 1: a record of more than 24 MB"),
        ("a.jsonl.zst", b"[" + b"[]," * ((8 << 20) - 9) + b"1]", "text in 'text', found list"),
        ("a.csv.zst", b"text\n" + b"ab," * ((8 << 20) - 9), "expected 1 columns"),
    ],
)  # fmt: skip
def test_what_expands_takes_less_than_a_gigabyte(
    name: str, content: bytes, says: str, tmp_path: Path
) -> None:
    """The largest records that are read, of the kinds that take most memory."""
    pyarrow, path = pytest.importorskip("pyarrow"), tmp_path / name
    if content:
        path.write_bytes(pyarrow.compress(content, "zstd", asbytes=True))
    else:
        text = pyarrow.array(["a" * (200 << 20)])
        path.write_bytes(column(text, compression="zstd", use_dictionary=False))
    program = r"""if True:
        import re, sys
        from nanonormuon.errors import DataError
        from nanonormuon.text.sources import documents
        try:
            list(documents([sys.argv[1]]))
        except DataError as error:
            print(error)
        print(re.search(r"VmHWM:\s*([0-9]+)", open("/proc/self/status").read())[1])"""
    command = [sys.executable, "-c", program, path]
    *message, peak = subprocess.run(command, stdout=-1, text=True).stdout.splitlines()
    assert says in message[0] and int(peak) * 1024 < 1e9, peak


def test_a_zstd_file_that_breaks_off(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    content = pyarrow.compress(bytes(range(32, 120)) * 9000, "zstd", asbytes=True)
    for cut in range(5, len(content), 7):
        (tmp_path / "a.txt").write_bytes(content[:cut])
        with pytest.raises(DataError, match="damaged compressed file"):
            list(documents([tmp_path / "a.txt"]))


def test_parquet_without_the_column_or_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(as_parquet(["x"]))
    with pytest.raises(DataError, match=r"expected text in 'body', found only id, text"):
        list(documents([path], text_field="body"))
    with pytest.raises(DataError, match=r"expected text in 'id', found int64"):
        list(documents([path], text_field="id"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingPackage, match=r"a\.parquet: Parquet needs .*: pip install pyarrow"):
        list(documents([path]))


def test_formats_without_their_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_bytes(as_array(["x"]))
    (tmp_path / "b.txt").write_bytes(as_zstd(b"text"))
    for name, module, package in (
        ("a.json", "ijson.backends.python", "ijson"),
        ("b.txt", "pyarrow", "pyarrow"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingPackage, match=rf"{name}: .*: pip install {package}$"):
            list(documents([tmp_path / name]))


def test_limits_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a record's format; a row of CSV may go on over many lines."""
    large = ["x", "y\n" * (1 << 17)]
    for name, at in (
        ("a.jsonl", "a.jsonl:2"), ("a.json", "a.json: after item 1"), ("a.csv", r"a.csv:\d+"),
        ("a.parquet", "a.parquet: row 2"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(FORMATS[name](large))
        with pytest.raises(DataError, match=rf"{at}: a record of more than 0.125 MB; .*--max-rec"):
            list(documents([tmp_path / name], max_record=1 << 17))
        assert len(list(documents([tmp_path / name], max_record=1 << 20))) == 2
    most = ["prepare", str(tmp_path / "a.jsonl"), "--out", str(tmp_path), "--max-record", "9" * 14]
    assert cli.main(most) == 2
    monkeypatch.setattr(sources, "PACKED_PARQUET_LIMIT", 100)
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(as_parquet(["x"])))
    with pytest.raises(DataError, match="decompress it"):
        list(documents([tmp_path / "a.parquet.gz"]))


def test_patterns_that_match_nothing(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for pattern in ("*.txt", "su*"):
        with pytest.raises(DataError, match="matches no file"):
            list(documents([str(tmp_path / pattern)]))


# ------------------------------------------------------------------------------------- long streams


WORDS = ["word ", "é", "字字", "\n", "\n\n", "\r\n \n", "<|>", "<", "|>", "x" * 9]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(WORDS), max_size=120),
    st.sampled_from(["", "<|>", "\n\n"]),
    st.lists(st.integers(1, 64), min_size=1, max_size=8),
)  # fmt: skip
def test_cutting_loses_nothing_and_does_not_see_blocks(
    words: list[str], separator: str, sizes: list[int]
) -> None:
    text = "".join(words).encode()

    def parts(sizes: list[int]) -> list[bytes]:
        blocks, at = [], 0
        while at < len(text):
            size = sizes[len(blocks) % len(sizes)]
            blocks.append(text[at : at + size])
            at += size
        return list(sources._parts(iter(blocks), separator.encode()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "LARGE", 64)
        patch.setattr(sources, "PART", 16)
        found = parts(sizes)
        assert found == parts([1]) == parts([len(text) + 1])
    whole = text.split(separator.encode()) if separator else [text]
    assert b"".join(found) == b"".join(whole)
    rest = iter(found)
    for document in whole:  # a short document is one part, a long one several that end well
        here = [next(rest)]
        while len(b"".join(here)) < len(document):
            here.append(next(rest))
        assert b"".join(here) == document
        assert (len(here) == 1) if len(document) <= 64 else all(len(p) <= 32 for p in here)
        for part in here:
            part.decode()


def test_no_cut_falls_into_a_separator_or_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGE", 64)
    monkeypatch.setattr(sources, "PART", 16)
    for n in range(60, 110):
        text = b"x" * n + b"<|>" + b"y" * 9
        for size in (1, 2, 7):
            blocks = [text[i : i + size] for i in range(0, len(text), size)]
            *before, last = sources._parts(iter(blocks), b"<|>")
            assert (b"".join(before), last) == (b"x" * n, b"y" * 9)
        parts = list(sources._parts(iter([b"x" * n + "字".encode() * 60]), b""))
        assert all(part.decode() for part in parts)


def test_a_part_ends_with_a_paragraph_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGE", 200)
    monkeypatch.setattr(sources, "PART", 50)
    text = b"".join(b"line of text %03d\n" % i + b"\n" * (i % 4 == 0) for i in range(60))
    parts = list(sources._parts(iter([text]), b""))
    assert len(parts) > 10 and all(part.endswith(b"\n\n") for part in parts[:-1])


def test_a_large_file_turning_binary_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LARGE", 1 << 10)
    (tmp_path / "a.txt").write_bytes(b"text " * 1000 + b"\0")
    with pytest.raises(
        DataError, match=r"a\.txt: offset 5000: expected UTF-8 text, found byte 0x00"
    ):
        list(documents([tmp_path]))


def test_characters_across_blocks_are_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LARGE", 3001)
    text = ("字" * 1000 + "\n\n").encode() * 9
    (tmp_path / "a.txt").write_bytes(text)
    assert b"".join(d.data for d in documents([tmp_path / "a.txt"])) == text


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def run(source: str, out: str, content: bytes = b"") -> int:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        return cli.main(["prepare", source, "--tokenizer", "byte", "--out", str(tmp_path / out)])

    lines = as_lines([f"document {i}" for i in range(300)])
    (tmp_path / "x.jsonl").write_bytes(lines)
    assert run("-", "a", lines) == run(str(tmp_path / "x.jsonl"), "b") == 0
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir())
    for name in names:
        a, b = ((tmp_path / d / name).read_bytes() for d in "ab")
        if name == "manifest.json":
            a, b = (json.loads(m.replace(b"standard input", b"x.jsonl")) for m in (a, b))
            assert a.pop("sha256") != b.pop("sha256")
        assert a == b
    assert run("-", "c") == 3 and "no text found" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()

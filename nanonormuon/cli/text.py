"""Prepare text for training, and inspect prepared data."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from nanonormuon.cli import options

SOURCES = "Files, directories, quoted patterns, or - for standard input."
TOKENIZER = "byte, gpt2, cl100k_base, o200k_base, bpe:N (trained here), or a tokenizer's file."
RECORD = "Largest JSON, CSV or Parquet record, in MB; reading takes about 30 times as much memory."
FORMAT = "shards, or nanogpt's train.bin."
SKIP = "Skip unreadable files, with a warning for each."
SEPARATOR = "Text that separates documents in a file; \\n and \\t for line break and tab."


def prepare(
    sources: Annotated[list[str], Argument(metavar="SOURCE", help=SOURCES)],
    out: Annotated[Path, Option(help="Directory for the shards.", **options.OUT)],
    tokenizer: Annotated[str, Option(help=TOKENIZER)] = "bpe:4096",
    val: Annotated[float, Option(help="Share of the text held out for validation.")] = 0.02,
    text_field: Annotated[str, Option(help="Field or column with a record's text.")] = "text",
    doc_separator: Annotated[str, Option(help=SEPARATOR)] = "",
    workers: Annotated[int, Option(min=0, help="Encoding threads; 0: one per core.")] = 0,
    skip_bad: Annotated[bool, Option("--skip-bad", help=SKIP)] = False,
    max_record: Annotated[int, Option(min=1, max=1 << 20, help=RECORD)] = 24,
) -> None:
    """Turn text into token shards to train on.

    Reads text, code, JSON lines and arrays, CSV and Parquet, also as .gz and .zst. Files may be
    larger than memory. Repeat an interrupted command to continue it.

    \b
    normuon-train prepare book.txt --out data/book --tokenizer byte
    normuon-train prepare notes/ essays.jsonl.gz --out data/mine --tokenizer bpe:4096 --val 0.05
    normuon-train prepare "wiki/*.parquet" --text-field body --tokenizer gpt2 --out data/wiki
    zcat stories.txt.gz | normuon-train prepare - --doc-separator "<|endoftext|>" --out data/st
    normuon-train run demo data.path=data/mine
    """
    from nanonormuon.text.prepare import prepare

    separator = doc_separator.replace("\\n", "\n").replace("\\t", "\t")
    manifest = prepare(
        sources, out, tokenizer, val, text_field=text_field, separator=separator, workers=workers,
        skip_bad=skip_bad, max_record=max_record << 20,
    )  # fmt: skip
    counts = "{documents:,} documents, {bytes:,} bytes, {tokens:,} tokens"
    for split in ("train", "val"):
        typer.echo(f"{split}: {counts.format(**manifest[split])}")
    typer.echo(f"next: normuon-train run demo {shlex.quote(f'data.path={out}')}")


def inspect(
    directory: Annotated[Path, Argument(help="Data directory.", **options.DIR)],
    tokenizer: Annotated[str, Option(help="Tokenizer, for shards that do not name theirs.")] = "",
    data_format: Annotated[str, Option("--format", help=FORMAT)] = "shards",
    as_json: options.AsJson = False,
) -> None:
    """Describe prepared data and report problems.

    Exits with 3 if training would refuse the data.

    \b
    normuon-train inspect data/mine
    normuon-train inspect data/fineweb --tokenizer gpt2 --json
    """
    from nanonormuon.text import inspection

    if data_format not in ("shards", "nanogpt"):
        raise typer.BadParameter(f'--format "{data_format}": expected shards or nanogpt')
    found = inspection.inspect(directory, tokenizer, data_format == "nanogpt")
    options.show(found, inspection.as_text(found), as_json)
    if "train" not in found or "refused" in found:
        raise typer.Exit(3)

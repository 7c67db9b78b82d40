"""Options that several commands share, and what a command prints."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

SETTINGS = "RECIPE|FILE.toml|SECTION.KEY=VALUE"
Run = Annotated[Path, Argument(metavar="RUN", help="Run, checkpoint or model directory.")]
Device = Annotated[str, Option(help="auto, cpu, cuda or mps.")]
Plot = Annotated[Path | None, Option(help="Also draw a picture: a .png, .svg or .pdf file.")]
Older = Annotated[Path | None, Option("--to", "-o", hidden=True)]  # --out's former names
AsJson = Annotated[bool, Option("--json", help="Print JSON, for programs.")]


def show(content: Any, text: str, as_json: bool) -> None:
    """Print a result: `text` for people, or `content` as JSON."""
    typer.echo(json.dumps(content, indent=1, ensure_ascii=False) if as_json else text)

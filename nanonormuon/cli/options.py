"""Options that several commands share, and what a command prints."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option


def named(value: str) -> Path:
    """A path that must have a name: Path("") is the whole working directory."""
    if not value:
        raise typer.BadParameter("a path expected, '' found; . is the working directory")
    return Path(value)


SETTINGS = "RECIPE|FILE.toml|SECTION.KEY=VALUE"
Run = Annotated[
    Path, Argument(metavar="RUN", help="Run, checkpoint or model directory.", parser=named)
]
Device = Annotated[str, Option(help="auto, cpu, cuda or mps.")]
Plot = Annotated[Path | None, Option(help="Also draw a picture: a .png, .svg or .pdf file.")]
Older = Annotated[Path | None, Option("--to", "-o", hidden=True)]  # --out's former names
AsJson = Annotated[bool, Option("--json", help="Print JSON, for programs.")]


def show(content: Any, text: str, as_json: bool) -> None:
    """Print a result: `text` for people, or `content` as JSON."""
    typer.echo(json.dumps(content, indent=1, ensure_ascii=False) if as_json else text)

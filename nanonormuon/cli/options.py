"""Options that several commands share, what a command prints, what a shell completes."""

import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from nanonormuon.errors import RunError

log = logging.getLogger("nanonormuon")


def named(value: str) -> Path:
    """A path that must have a name: Path("") is the whole working directory."""
    if not value:
        raise typer.BadParameter("a path expected, '' found; . is the working directory")
    return Path(value)


def folder(value: str) -> Path:
    """A directory that exists or may be made."""
    if (path := named(value)).exists() and not path.is_dir():
        raise typer.BadParameter(f"{path}: expected a directory, found a file")
    return path


def completions(incomplete: str) -> list[str]:
    """Recipes, then settings, that begin as what has been typed."""
    from nanonormuon.config import KINDS, recipes

    names = [*recipes(), *(f"{name}=" for name in KINDS)]
    return [name for name in names if name.startswith(incomplete)]


def runs(having: str) -> list[Path]:
    """The runs in runs/ that have a file or directory of this name, the latest last."""
    found = sorted(Path("runs").glob(f"*/{having}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise RunError(f"no RUN given, and none in runs/ has {having}: name one, or train one")
    return [path.parent for path in found]


def newest(having: str = "checkpoints") -> Path:
    """The run that has saved last."""
    if "_NORMUON_TRAIN_COMPLETE" in os.environ:  # a shell that completes a word asks for it too
        return Path()
    log.info(f"run: {(run := runs(having)[-1])}")
    return run


SETTINGS = {"metavar": "RECIPE|FILE.toml|SECTION.KEY=VALUE", "autocompletion": completions}
DIR = {"metavar": "DIR", "parser": named}
OUT = {"metavar": "DIR", "parser": folder}
RUN = {"metavar": "RUN", "show_default": False, "parser": named}
MODEL = "Run, checkpoint or model directory; by default the newest run in runs/."
Run = Annotated[Path, Argument(default_factory=newest, help=MODEL, **RUN)]
Device = Annotated[str, Option(help="auto, cpu, cuda or mps.")]
Plot = Annotated[Path | None, Option(help="Also draw a picture: a .png, .svg or .pdf file.")]
Older = Annotated[Path | None, Option("--to", "-o", hidden=True)]  # --out's former names
AsJson = Annotated[bool, Option("--json", help="Print JSON, for programs.")]


def show(content: Any, text: str, as_json: bool) -> None:
    """Print a result: `text` for people, or `content` as JSON."""
    typer.echo(json.dumps(content, indent=1, ensure_ascii=False) if as_json else text)

"""Look at runs: tables, curves, pages, spectra."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from nanonormuon.cli import options

Runs = list[Path] | None


def compare(
    paths: Annotated[Runs, Argument(metavar="RUN...", help="Runs; else all in runs/.")] = None,
    target: Annotated[float | None, Option(help="Show when val_loss reached this value.")] = None,
    plot: options.Plot = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare runs in a table, or plot their curves.

    \b
    normuon-train compare runs/a runs/b --target 3.28
    normuon-train compare runs/* --plot curves.png
    """
    from nanonormuon.runs import compare as comparing

    runs = comparing.read_all(paths or options.runs("metrics.jsonl"))
    if plot is not None:
        comparing.plot(runs, plot, target)
    text = comparing.table(runs, target) + (f"\ncurves: {plot}" if plot else "")
    options.show([comparing.row_of(run, target) for run in runs], text, as_json)


def report(
    paths: Annotated[Runs, Argument(metavar="RUN...", help="Runs; else the newest.")] = None,
    out: Annotated[Path, Option(help="HTML file to write.")] = Path("report.html"),
    older: options.Older = None,
) -> None:
    """Write runs as one HTML page.

    The page shows curves, samples over time, configuration and environment, and is a single file.
    An existing page is replaced only if it shows the same runs.

    \b
    normuon-train report RUN --out report.html
    """
    from nanonormuon.runs.report import write

    out = older or out
    write(paths or [options.newest("metrics.jsonl")], out)
    typer.echo(f"{out}: open it in a browser")


def diagnose(
    path: options.Run,
    plot: options.Plot = None,
    layers: Annotated[str, Option(help='Layers to plot, such as "0,5,11"; default: three.')] = "",
    as_json: options.AsJson = False,
) -> None:
    """Measure the spectrum of the optimizer's updates.

    For each matrix, compares the singular values and neuron norms of the momentum, Muon's update
    and NorMuon's update. A model directory has no momentum: its weights are measured.

    \b
    normuon-train diagnose RUN
    normuon-train diagnose RUN/checkpoints/step-000500 --plot update.png --layers 0,11
    """
    from nanonormuon.runs import spectra

    try:
        wanted = [int(i) for i in layers.split(",") if i.strip()]
    except ValueError:
        raise typer.BadParameter(f'--layers "{layers}": expected numbers, such as 0,5,11') from None
    if wanted and plot is None:
        raise typer.BadParameter(f'--layers "{layers}": expected with --plot only')
    profiles = spectra.diagnose(path)
    if plot is not None:
        spectra.draw(profiles, plot, wanted)
    text = spectra.table(profiles) + (f"\npicture: {plot}" if plot else "")
    options.show(spectra.as_numbers(profiles), text, as_json)

"""Figures drawn with matplotlib, which is imported only to draw one."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from nanonormuon.errors import UsageError
from nanonormuon.runtime.packages import need


@contextmanager
def picture(file: Path, rows: int, columns: int, width: float, height: float) -> Iterator[Any]:
    """Give axes (rows, columns), each `width` by `height` inches, to draw on; then save the figure
    as PNG, SVG or PDF. Raises UsageError for another file name, MissingPackage, OSError."""
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {file}: expected a name that ends in .png, .svg or .pdf")
    package = need("matplotlib", "--plot")
    package.use("Agg")
    package.rcParams["text.parse_math"] = False  # a $ in a run's name is no formula
    from matplotlib import pyplot

    size = columns * width, rows * height
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    colours = pyplot.rcParams["axes.prop_cycle"].by_key()["color"]
    styles = [*islice(cycle(("-", "--", "-.", ":")), len(colours))]
    for axis in axes.flat:  # a curve shows between the dashes of another that lies on it
        axis.set_prop_cycle(color=colours, linestyle=styles)
    yield axes
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.set_visible(axis.has_data())
    axes[0, 0].legend(fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)

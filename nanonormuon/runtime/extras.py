"""Packages that only some commands need: imported when used, named when they are not there."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any


class UsageError(ValueError):
    """A command was asked for what it cannot do here."""

    exit_code = 2


class MissingPackage(UsageError):
    pass


def need(module: str, purpose: str) -> ModuleType:
    """Import a module. Raises MissingPackage with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingPackage(
            f"{purpose} needs {package}, which is not usable here ({error}): pip install {package}"
        ) from None


@contextmanager
def picture(file: Path, rows: int, columns: int, width: float, height: float) -> Iterator[Any]:
    """matplotlib's axes (rows, columns), each so many inches large, to draw on; saved as PNG, SVG
    or PDF at the end. Raises UsageError for another file name, MissingPackage, OSError."""
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {file}: expected a name that ends in .png, .svg or .pdf")
    need("matplotlib", "--plot").use("Agg")
    from matplotlib import pyplot

    size = columns * width, rows * height
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    yield axes
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.set_visible(axis.has_data())
    axes[0, 0].legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)

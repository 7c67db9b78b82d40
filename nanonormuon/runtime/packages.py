"""Optional packages, imported on demand."""

import importlib
from types import ModuleType

from nanonormuon.errors import MissingPackage


def need(module: str, purpose: str) -> ModuleType:
    """Import an optional package. Raises MissingPackage with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        needed = f"{purpose} needs the package {package}, whose import fails ({error})"
        raise MissingPackage(f"{needed}: pip install {package}") from None

"""Optional packages, imported when a command needs them."""

import importlib
from types import ModuleType

from nanonormuon.errors import MissingPackage


def need(module: str, purpose: str) -> ModuleType:
    """Import an optional package. Raises MissingPackage with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingPackage(
            f"{purpose} needs {package}, which cannot be imported here ({error}): "
            f"pip install {package}"
        ) from None

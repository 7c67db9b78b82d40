"""nanonormuon: train small language models with NorMuon (arXiv 2510.05491)."""

from typing import Any

__all__ = ["NorMuon", "param_groups"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Both names, when they are asked for: the command line must not wait for torch."""
    if name == "NorMuon":
        from nanonormuon.normuon import NorMuon

        return NorMuon
    if name == "param_groups":
        from nanonormuon.optim import param_groups

        return param_groups
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

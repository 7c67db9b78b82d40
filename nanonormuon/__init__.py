"""nanonormuon: train small language models with NorMuon (arXiv 2510.05491)."""

from nanonormuon.normuon import NorMuon
from nanonormuon.optim import param_groups

__all__ = ["NorMuon", "param_groups"]
__version__ = "0.1.0"

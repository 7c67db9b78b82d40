"""NorMuon with 8-bit Muon's momentum (arXiv 2510.05491 and 2509.23106).

The momentum rests in int8 with one float32 scale per block of at most 2,048 weights of a row; the
second moment, one number per neuron, stays in float32: at width n, 1 + 8 / n bytes per weight
instead of 4 + 4 / n. Everything else is NorMuon's update. No paper has this combination; it is the
state that NorMuon adds to Muon's, and too small to be worth rounding.
"""

from nanonormuon.lab.zoo.muon8bit import Muon8bit


class NorMuon8bit(Muon8bit):
    def keeps(self, m: int, n: int) -> dict[str, tuple]:
        return super().keeps(m, n) | {"second_moment": (m, 1)}

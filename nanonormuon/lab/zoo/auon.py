"""AuON (arXiv 2509.24320): no orthogonalisation, one scale per matrix.

    M <- momentum M + (1 - momentum) G
    X  = momentum M + (1 - momentum) G       Nesterov's; without it X = M
    H  = X / |X|_F                           hybrid: one iteration of newton_schulz(X)
    U  = H / rms(cosh(H))                    root mean square over the m n weights
    W <- (1 - lr weight_decay) W - lr sqrt(max(1, m / n)) U

Against NorMuon: linear in the number of weights, nothing whole is needed: two sums per matrix. The
singular values keep their spread. |U|_F is about 1 where NorMuon's update has about sqrt(min(m,
n)), so rates are that much larger (0.24 at width 128). Since |H|_F = 1, rms(cosh(H)) lies within 1
/ (2 m n) of 1, roughly: the plain form is momentum divided by its norm.

Sources disagree. The authors' code (ryyzn9/AuON) multiplies H by gamma = 1.5 within the cosh, which
changes as little, and divides X itself by rms(cosh), so that there the gradient's size matters; it
has no sqrt(max(1, m / n)). Here: the paper's formula, as a page of formulas has it. Whether the
hybrid divides by the norm once more could not be found; here it does not.
"""

import math

from torch import Tensor

from nanonormuon.lab.zoo.base import Neighbour, lookahead
from nanonormuon.lab.zoo.buckets import Bucket


class AuON(Neighbour):
    def __init__(
        self, params, lr: float = 0.24, weight_decay: float = 0.1, *, hybrid: bool = False, **shared
    ):
        super().__init__(params, lr, weight_decay, hybrid=hybrid, **shared)

    def update(self, G: Tensor, group: dict, bucket: Bucket) -> Tensor:
        X, (m, n) = lookahead(G, bucket.buffers["momentum"], group), bucket.shape
        H = bucket.orthogonal(X, group, steps=1) if group["hybrid"] else X / bucket.norm(X)
        rms = bucket.norm(H.cosh()) / math.sqrt(m * n)
        return H / rms * math.sqrt(max(1, m / n))

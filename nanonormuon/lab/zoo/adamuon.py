"""AdaMuon (arXiv 2507.11005): Muon of the momentum's signs, then a second moment per weight.

    M <- momentum M + (1 - momentum) G
    O  = newton_schulz(sign(M))
    V <- beta2 V + (1 - beta2) O^2           one number per weight
    U  = O / (sqrt(V) + eps)
    W <- (1 - lr weight_decay) W - lr 0.2 sqrt(m n) U / |U|_F

Against NorMuon: signs before Newton-Schulz; a second moment per weight, not per neuron, so the
state is twice as large. The update's root mean square is 0.2, so AdamW's rates carry over (about
0.003).

Sources disagree. The paper takes the sign; the authors' code (Chongjie-Si/AdaMuon) takes none, but
a Nesterov step, and beta2 = 0.999; it corrects the bias of V, which |U|_F cancels. Here: the paper,
with the sign as an option and the Nesterov step as optim.nesterov; beta2 = 0.95 is our guess at the
paper's, whose text could not be read. pytorch_optimizer's AdaMuon has sign=False, nesterov=False.
"""

import math

from torch import Tensor

from nanonormuon.lab.zoo.base import Neighbour, lookahead
from nanonormuon.lab.zoo.buckets import Bucket


class AdaMuon(Neighbour):
    def __init__(
        self, params, lr: float = 0.003, weight_decay: float = 0.1, *, beta2: float = 0.95,
        eps: float = 1e-8, sign: bool = True, **shared,
    ):  # fmt: skip
        super().__init__(params, lr, weight_decay, beta2=beta2, eps=eps, sign=sign, **shared)

    def keeps(self, m: int, n: int) -> dict[str, tuple]:
        return {"momentum": (m, n), "second_moment_per_weight": (m, n)}

    def update(self, G: Tensor, group: dict, bucket: Bucket) -> Tensor:
        M, V = bucket.buffers.values()
        X = lookahead(G, M, group)
        O = bucket.orthogonal(X.sign() if group["sign"] else X, group)
        V.lerp_(O.square(), 1 - group["beta2"])
        U = O / (V.sqrt() + group["eps"])
        return U * (0.2 * math.sqrt(math.prod(bucket.shape)) / bucket.norm(U))

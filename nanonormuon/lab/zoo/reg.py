"""REG (arXiv 2510.03691): rows and columns are scaled to equal norms; no matrix sign.

    M <- momentum M + (1 - momentum) G
    X  = Nesterov's look ahead of M, or M
    R  = X / |rows of X|                     every row has norm 1
    R <- R / |columns of R|                  then every column (RACS, with the 2-norm)
    W <- (1 - lr weight_decay) W - lr 0.2 sqrt(m n) R / |R|_F

Against NorMuon: linear in the number of weights, and no second moment: NorMuon equalises the rows
of an orthogonal matrix over time, REG those of the momentum at once. The paper claims that models
trained with AdamW remain tunable, as they do not with Muon. AdamW's rates carry over (about 0.003).

What could be read of the paper: the operator scales rows and columns, p = 2 works best, and the
update's root mean square is fixed. Not found: whether rows come first (here they do), whether one
pass is all (here it is), the constant of the root mean square (here Moonlight's 0.2), and whether
there is a Nesterov step (a setting).
"""

import math

from torch import Tensor

from nanonormuon.lab.zoo.base import Neighbour, lookahead
from nanonormuon.lab.zoo.buckets import Bucket


class REG(Neighbour):
    def __init__(self, params, lr: float = 0.003, weight_decay: float = 0.1, **shared):
        super().__init__(params, lr, weight_decay, **shared)

    def update(self, G: Tensor, group: dict, bucket: Bucket) -> Tensor:
        X = lookahead(G, bucket.buffers["momentum"], group)
        R = X / X.norm(dim=-1, keepdim=True).clamp_min(1e-20)
        columns = bucket.total(R.square().sum(-2, keepdim=True)).sqrt()
        R = R / columns.clamp_min(1e-20)
        return R * (0.2 * math.sqrt(math.prod(bucket.shape)) / bucket.norm(R))

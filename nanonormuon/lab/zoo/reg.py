"""REG (arXiv 2510.03691): rows and columns are scaled to equal norms; no matrix sign.

    M <- momentum M + (1 - momentum) G
    X  = Nesterov's look ahead of M, or M
    R  = X / |rows of X|                     every row has norm 1
    R <- R / |columns of R|                  then every column (RACS, with the 2-norm)
    W <- (1 - lr weight_decay) W - lr 0.2 sqrt(m n) R / |R|_F

Against NorMuon: linear in the number of weights, and no second moment: NorMuon equalises the rows
of an orthogonal matrix over time, REG those of the momentum at once. The paper claims that models
trained with AdamW remain tunable, as they do not with Muon. AdamW's rates carry over (about 0.003).

Checked against what can be read of the paper (abstract, introduction, summaries; not its
algorithm): the operator scales rows and columns in place of Muon's matrix sign, p = 2 works best,
the update's root mean square is fixed, weight decay is decoupled, the state is the momentum alone,
and embeddings have AdamW. Its experiments are fine-tuning and vision, without pretraining of
language models. Not found, so a guess: rows before columns, one pass, the constant of the root mean
square (Moonlight's 0.2), and Nesterov's look ahead (here optim.nesterov).
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

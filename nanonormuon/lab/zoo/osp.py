"""The optimizer of Outlier-Safe Pre-Training (arXiv 2506.19697): Muon at AdamW's rates.

    M <- momentum M + (1 - momentum) G
    W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(m, n)) newton_schulz(M)

Against NorMuon: no second moment and no Nesterov step; the scale is the one at which AdamW's rates
carry over (about 0.003). The paper's claim is about activations: no optimizer that scales each
weight by itself, so no channel that outgrows the others, so that 4 bits per weight and activation
cost little. Two of its three parts are the model's, not the optimizer's: RMSNorm with one scale for
all channels, and learnable projections at the embedding; embeddings stay with Adam ("decoupled
embedding optimization"), as everywhere here. Without those two parts the authors' table has an
excess kurtosis of 1,575 instead of 0.04 (Adam: 1,819; Muon for the embeddings too: 361).

What could be read (README of dmis-lab/Outlier-Safe-Pre-Training): momentum 0.95, 5 iterations,
weight decay 0.01, a rate of 5e-4. Not found: the constant of the scale (here Moonlight's 0.2, which
that rate suggests), and whether there is a Nesterov step (here not, whatever optim.nesterov is).
Excess kurtosis can be measured on any checkpoint's activations; the optimizer does not need it.
"""

from torch import Tensor

from nanonormuon.lab.zoo.base import Neighbour, lookahead
from nanonormuon.lab.zoo.buckets import Bucket
from nanonormuon.normuon import neuron_factors


class OSP(Neighbour):
    def __init__(self, params, lr: float = 0.003, weight_decay: float = 0.01, **shared):
        super().__init__(params, lr, weight_decay, **shared)

    def update(self, G: Tensor, group: dict, bucket: Bucket) -> Tensor:
        M = lookahead(G, bucket.buffers["momentum"], group | {"nesterov": False})
        O = bucket.orthogonal(M, group)
        return O * neuron_factors(O, None, 0, "match_rms_adamw", bucket.shape, bucket.total)

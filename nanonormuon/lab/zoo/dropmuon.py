"""Drop-Muon (arXiv 2510.02239): each step updates the layers from a random one on.

    s  uniform in 0 .. number of layers - 1, anew for each step
    layers before s:  nothing changes, momentum included
    the others:       Muon's step, with weight decay

Against NorMuon: no second moment; in the mean, half of the layers move. The point is time: the
backward pass could end at layer s. Here it does not, since gradients are there before the optimizer
is asked, so only the optimizer's own share is saved: compare steps and tokens, not seconds.

s is a function of the seed and of the number of steps taken, which is saved, so it is equal on all
ranks and after a resume. A layer is the number in a parameter's name ("layers.3.mlp...", from the
groups' names), or else its place in the list. The paper's sampling is this one ("randomized
progressive training"); its step is the sharp operator, which also multiplies by the sum of the
singular values of M; practice, and its experiments' Muon, leave that to the rate. Its momentum beta
is 1 minus ours.
"""

import re

import torch
from torch import Tensor

from nanonormuon.lab.zoo.base import Neighbour, lookahead
from nanonormuon.lab.zoo.buckets import Bucket
from nanonormuon.normuon import OneProcess, layout_of, neuron_factors


class DropMuon(Neighbour):
    def __init__(
        self, params, lr: float = 0.02, weight_decay: float = 0.1, *, seed: int = 0, **shared
    ):
        super().__init__(params, lr, weight_decay, seed=seed, **shared)
        every = [p for group in self.param_groups for p in group["params"]]
        names = [name for group in self.param_groups for name in group.get("names", ())]
        numbers = [re.search(r"\.(\d+)\.", f".{name}") for name in names]
        known = len(names) == len(every) and all(numbers)
        self.layer = {p: int(numbers[i][1]) if known else i for i, p in enumerate(every)}

    def keeps(self, m: int, n: int) -> dict[str, tuple]:
        return {"momentum": (m, n), "step": (1, 1)}

    def first(self, step: int, seed: int) -> int:
        """s for this step."""
        random = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return int(torch.randint(max(self.layer.values()) + 1, (), generator=random))

    def advance(self, G: Tensor, group: dict, bucket: Bucket) -> None:
        step = bucket.buffers["step"]
        s = self.first(int(step.max()), group["seed"])
        step += 1
        active = [p for p in bucket.params if self.layer[p] >= s]
        if active:
            each = len(G) // len(bucket.params)  # matrices per parameter: more than 1 in a stack
            rows = [each * i + j for i, p in enumerate(bucket.params) if self.layer[p] >= s
                    for j in range(each)]  # fmt: skip
            whole = isinstance(bucket.layout, OneProcess)
            layout = bucket.layout if whole else layout_of(active[0], len(rows))
            M = {"momentum": bucket.buffers["momentum"][rows]}
            super().advance(G[rows], group, Bucket(active, bucket.group, layout, M))
            bucket.buffers["momentum"][rows] = M["momentum"]

    def update(self, G: Tensor, group: dict, bucket: Bucket) -> Tensor:
        O = bucket.orthogonal(lookahead(G, bucket.buffers["momentum"], group), group)
        kind = group["adjust_lr_fn"]
        return O * neuron_factors(O, None, 0, kind, bucket.shape, bucket.total)

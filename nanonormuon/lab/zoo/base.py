"""What the zoo's optimizers share: settings, momentum, weight decay, state.

A rule is a subclass of Neighbour. `keeps` names its buffers, and `update` turns gradients into what
lr multiplies, for a stack of K equal matrices of which this rank holds some rows: (K, rows here,
n). It is exact on one process, under DDP and under FSDP2 if it works within rows and leaves the
rest to the bucket's `orthogonal`, `on_whole`, `norm` and `total`. Each bucket's communication waits
for the bucket before it, which NorMuon overlaps.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nanonormuon.lab.zoo.buckets import Bucket
from nanonormuon.normuon import CHOICES, MUON, local, unstack

SHARED = {
    "momentum": 0.95,
    "nesterov": True,
    "adjust_lr_fn": "original",  # NorMuon's arguments, for the rules that use them
    "ns_coefficients": MUON,
    "ns_steps": 5,
    "ns_dtype": torch.bfloat16,
}


class Neighbour(torch.optim.Optimizer):
    """An optimizer of matrices, stored (outputs, inputs), or stacks of them.

    Decay is decoupled: W <- (1 - lr weight_decay) W - lr update. State exists from construction on.
    """

    state_by_parameter = True  # each buffer is a tensor of one parameter, placed like it

    def __init__(self, params, lr: float, weight_decay: float, **own):
        self.buckets: list[Bucket] = []
        super().__init__(params, SHARED | own | {"lr": lr, "weight_decay": weight_decay})

    def keeps(self, m: int, n: int) -> dict[str, tuple]:
        """The buffers of an m x n matrix: name -> (rows, columns) or (rows, columns, dtype). m rows
        are shared out as the matrix's are; a single row lies on every rank."""
        return {"momentum": (m, n)}

    def update(self, G: Tensor, group: dict, bucket: Bucket) -> Tensor:
        """Gradients -> update, both (K, rows here, n); moves the buffers."""
        raise NotImplementedError

    def advance(self, G: Tensor, group: dict, bucket: Bucket) -> None:
        """Update a bucket's weights."""
        U, W = self.update(G, group, bucket), [local(p) for p in bucket.params]
        torch._foreach_mul_(W, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(W, unstack((group["lr"] * U).to(W[0].dtype), W))

    @torch.no_grad()
    def step(self, closure=None):
        loss = torch.enable_grad()(closure)() if closure else None
        for bucket in self.buckets:
            if len(G := bucket.gradients()):  # a rank may have none of a stack of matrices
                self.advance(G, self.param_groups[bucket.group], bucket)
        return loss

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group, alike = self.param_groups[-1], {}
        for p in group["params"]:
            wrong = group["adjust_lr_fn"] not in CHOICES["adjust_lr_fn"]
            if wrong or p.ndim not in (2, 3) or min(p.shape[-2:]) < 2 or "neuron_axis" in group:
                found = f"{type(self).__name__}, {tuple(p.shape)}, {group['adjust_lr_fn']}"
                raise ValueError(f"{found}: expected matrices (outputs, inputs), a known scale")
            where = (p.device_mesh, p.placements) if isinstance(p, DTensor) else None
            alike.setdefault((p.shape, p.dtype, p.device, where), []).append(p)
        for params in alike.values():
            kept = self.keeps(*params[0].shape[-2:])
            self.buckets.append(Bucket.make(params, len(self.param_groups) - 1, kept, self.state))

    def load_state_dict(self, state_dict: dict) -> None:
        kept, ids = self.state, [i for g in state_dict["param_groups"] for i in g["params"]]
        super().load_state_dict(state_dict | {"state": {}})
        self.state = kept  # whose tensors are views of the stacks, and keep their dtype
        for i, p in zip(ids, [p for group in self.param_groups for p in group["params"]]):
            for key, buffer in kept[p].items():
                buffer.copy_(state_dict["state"][i][key])


def lookahead(G: Tensor, M: Tensor, group: dict) -> Tensor:
    """Move the momentum M and return it, or Nesterov's look ahead of it."""
    M.lerp_(G, 1 - group["momentum"])
    return G.lerp(M, group["momentum"]) if group["nesterov"] else M

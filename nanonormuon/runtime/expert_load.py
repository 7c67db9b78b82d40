"""The load of experts in a step, and the update of the routers' balancing biases."""

import math

import torch

from nanonormuon.model import GPT
from nanonormuon.runtime import distributed
from nanonormuon.runtime.distributed import World


class ExpertLoad:
    """Counts a step's visits by layer and expert in integers: exact however the batch is split."""

    def __init__(self, model: GPT, world: World):
        self.model, self.world = model, world
        self.routers = [m for m in model.modules() if hasattr(m, "rebalance")]
        self.begin()

    def begin(self) -> None:
        """Reset the counts before a step's passes, which may be a second attempt."""
        device = self.world.device
        self.visits = torch.zeros((), dtype=torch.int64, device=device)
        self.entropy = torch.zeros((), device=device)

    def add(self, count: int) -> None:
        """Add the last forward pass, one of this rank's `count`."""
        visits, entropies, _ = zip(*self.model.routed)
        self.visits = self.visits + torch.stack(visits)
        self.entropy = self.entropy + torch.stack(entropies).mean() / count / self.world.size

    def finish(self) -> None:
        """Sum the counts over ranks; every rank must call this."""
        distributed.total(self.visits)
        distributed.total(self.entropy)

    def apply(self) -> None:
        """Move the routers' biases."""
        for router, visits in zip(self.routers, self.visits):
            router.rebalance(visits)

    def row(self) -> dict[str, float]:
        """Return metrics. expert_load_min, _max: fewest and most visits of an expert, over its
        layer's mean. experts_idle: how many had none. router_entropy: of a token's normalised
        scores, over its maximum."""
        load = self.visits / self.visits.double().mean(1, keepdim=True)
        entropy = self.entropy / math.log(load.size(1))
        found = torch.stack([load.min(), load.max(), (load == 0).sum(), entropy]).tolist()
        keys = ("expert_load_min", "expert_load_max", "experts_idle", "router_entropy")
        return dict(zip(keys, found))

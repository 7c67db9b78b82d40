"""How evenly the tokens of a step are spread over experts, and the bias rule that evens it out."""

import math

import torch

from nanonormuon.model import GPT
from nanonormuon.runtime import distributed
from nanonormuon.runtime.distributed import World


class ExpertLoad:
    """Counts the visits of a step by layer and expert, over all micro-batches and ranks. Whole
    numbers: exact, however the batch is split."""

    def __init__(self, model: GPT, world: World):
        self.model, self.world = model, world
        self.routers = [m for m in model.modules() if hasattr(m, "rebalance")]
        self.begin()

    def begin(self) -> None:
        """Forget what was counted: the passes of a step begin, perhaps again."""
        device = self.world.device
        self.visits = torch.zeros((), dtype=torch.int64, device=device)
        self.entropy = torch.zeros((), device=device)

    def add(self, count: int) -> None:
        """Count the visits of the last forward pass, one of `count` of this rank."""
        visits, entropies, _ = zip(*self.model.routed)
        self.visits = self.visits + torch.stack(visits)
        self.entropy = self.entropy + torch.stack(entropies).mean() / count / self.world.size

    def finish(self) -> None:
        """Add up what the ranks have counted; every rank takes part."""
        distributed.total(self.visits)
        distributed.total(self.entropy)

    def apply(self) -> None:
        """Move the routers' biases after an update."""
        for router, visits in zip(self.routers, self.visits):
            router.rebalance(visits)

    def row(self) -> dict[str, float]:
        """expert_load_min, _max: visits of the idlest and of the busiest expert of any layer, over
        the layer's mean. experts_idle: experts without a visit. router_entropy: of a token's
        scores, as shares, over that of even shares."""
        load = self.visits / self.visits.double().mean(1, keepdim=True)
        entropy = self.entropy / math.log(load.size(1))
        found = torch.stack([load.min(), load.max(), (load == 0).sum(), entropy]).tolist()
        keys = ("expert_load_min", "expert_load_max", "experts_idle", "router_entropy")
        return dict(zip(keys, found))

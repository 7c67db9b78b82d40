"""Backward passes and updates on one process, under DDP, under FSDP2, or bitwise reproducible.

An engine owns the model, its optimizers and gradients. The loop calls `accumulate`, `clip`,
`update` and `zero_grad` and does not know the layout.
"""

import inspect
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from nanonormuon.errors import ConfigError, describe, exit_code, out_of_memory
from nanonormuon.model import GPT
from nanonormuon.normuon import NorMuon, OneProcess
from nanonormuon.runtime import distributed
from nanonormuon.runtime.distributed import World
from nanonormuon.runtime.memory import together
from nanonormuon.storage.tensors import placed_like, whole

Make = Callable[[nn.Module], list[Optimizer]]


class Engine:
    """A model in training.

    model: on its device. make: makes a model's optimizers. parallel: "ddp", or "fsdp" or "hsdp" for
    FSDP2, which turns the model's parameters into DTensors in place. dtype: FSDP2's compute dtype.
    reshard: under FSDP2, free a block's gathered weights after its forward pass. grad_clip: maximum
    gradient norm; 0: no clipping. qk_clip: see runtime/qk_clip.py.
    """

    dealt = False  # see data.Loader

    def __init__(
        self,
        model: GPT,
        make: Make,
        world: World,
        parallel: str = "ddp",
        dtype: torch.dtype | None = torch.float32,
        reshard: bool = True,
        grad_clip: float = 0.0,
        qk_clip: float = 0.0,
    ):
        self.model, self.world, self.grad_clip = model, world, grad_clip
        self.replica: nn.Module = model
        self.sharded = parallel in ("fsdp", "hsdp") and distributed.grouped()
        self.mesh = grid(world, parallel) if self.sharded else None
        # whether a rank that runs out of memory in a forward pass cannot notify the others
        self.lockstep = world.size == 1 or self.sharded or self.dealt
        self.qk_clip = None
        if qk_clip:
            from nanonormuon.runtime.qk_clip import QkClip  # few runs need it

            self.qk_clip = QkClip(model, qk_clip, world.device)
        self.expert_load = None
        if model.config.mlp == "experts":
            from nanonormuon.runtime.expert_load import ExpertLoad  # few runs need it

            self.expert_load = ExpertLoad(model, world)
        self.distribute(dtype, reshard)
        self.forward: Callable[..., Tensor] = self.replica  # or its compiled form
        self.optimizers = make(model)
        self.compiled: dict[Optimizer, Callable[[], None]] = {}  # steps

    def distribute(self, dtype: torch.dtype | None, reshard: bool) -> None:
        """Shard or replicate the model if there are other ranks."""
        if self.sharded:
            shard(self.model, self.mesh, dtype, reshard)
        elif distributed.grouped():
            known = inspect.signature(DistributedDataParallel).parameters
            new, old = "forward_sync_buffers", "broadcast_buffers"  # renamed in torch 2.13
            unsynced = {new if new in known else old: False}
            self.replica = DistributedDataParallel(
                self.model, gradient_as_bucket_view=True, **unsynced
            )
            self.replica.require_backward_grad_sync = False  # see sync

    @property
    def evaluate(self) -> Callable[..., Tensor]:
        """The forward pass without DDP's hooks, compiled if training is."""
        return self.model if self.forward is self.replica else self.forward

    def state(self) -> list[Tensor]:
        """Return this rank's weights and optimizer buffers."""
        states = (s for optimizer in self.optimizers for s in optimizer.state.values())
        buffers = (t for state in states for t in state.values())
        return [*self.model.parameters(), *(t for t in buffers if isinstance(t, Tensor))]

    def accumulate(self, micro_batches: Iterator[tuple[Tensor, Tensor]], count: int) -> Tensor:
        """Add up the gradients of `count` micro-batches; returns this rank's mean loss (0-d).

        Replicas communicate only in the last backward pass. Before it, a rank that runs out of
        memory can notify the others (memory.together), which would otherwise wait for it there.
        """
        mean = torch.zeros((), device=self.world.device)
        if self.qk_clip:
            self.qk_clip.begin()
        if self.expert_load:
            self.expert_load.begin()

        def forward() -> Tensor:
            part = self.forward(*next(micro_batches)) / count
            if self.expert_load:
                self.expert_load.add(count)
            return part

        def backward(part: Tensor) -> None:
            self.backward(part)
            mean.add_(part.detach())

        def up_to_the_last() -> Tensor:
            for _ in range(count - 1):
                backward(forward())
            return forward()

        self.sync(False)
        last = together(up_to_the_last, alone=self.lockstep)
        self.sync(True)
        backward(last)
        if self.expert_load:
            self.expert_load.finish()
        return mean

    def backward(self, part: Tensor) -> None:
        """Add a micro-batch's share of the gradient."""
        part.backward()

    def sync(self, on: bool) -> None:
        """Choose whether the next backward pass averages gradients over ranks.

        Called after the forward pass, because ranks may still agree to leave out the backward pass,
        and DDP cannot undo its preparation.
        """
        if self.sharded:
            self.model.set_requires_gradient_sync(on)  # type: ignore[attr-defined]
        elif on and isinstance(self.replica, DistributedDataParallel):
            self.replica.reducer.prepare_for_backward([])  # as its own forward pass does

    def clip(self, norm: float) -> None:
        """Scale gradients of the given norm down to grad_clip."""
        if self.grad_clip:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            scale = self.grad_clip / torch.tensor(norm, device=self.world.device)
            torch._foreach_mul_(grads, scale.clamp(max=1.0))

    def update(self) -> None:
        """Step the optimizers, then apply QK-clip and move the routers' biases."""
        self.step()
        if self.qk_clip:
            self.qk_clip.apply()
        if self.expert_load:
            self.expert_load.apply()

    def step(self) -> None:
        """Step the optimizers."""
        for optimizer in self.optimizers:
            with blaming(optimizer):
                self.compiled.get(optimizer, optimizer.step)()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad(set_to_none=True)

    def compile(self, trial: Callable[[], tuple[Tensor, Tensor]]) -> tuple[float, str]:
        """Compile the forward and backward pass if a trial batch then works on all ranks, and, on a
        single GPU, NorMuon's step.

        Returns the seconds taken, and why it failed ("" if it did not). Leaves no gradients. Raises
        as `accumulate` does when out of memory.
        """
        start, failures = time.perf_counter(), []

        def passes() -> None:
            try:  # under FSDP2 torch runs uncompiled what it cannot trace
                with torch._dynamo.config.patch(suppress_errors=self.sharded):
                    fast(*trial()).backward()
            except Exception as error:
                if self.sharded or out_of_memory(error):  # FSDP2 cannot leave a pass midway
                    raise
                failures.append(error)

        fast = torch.compile(self.replica, backend=tolerant(failures), dynamic=False)
        # zero_grad would not reach a gradient that FSDP2 has not reduced
        self.sync(self.sharded)
        together(passes, alone=self.lockstep)
        self.zero_grad()
        lines = [f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}" for e in failures]
        if distributed.largest([len(lines)], self.world.device)[0]:
            return time.perf_counter() - start, (*lines, "on another rank")[0]
        self.forward = fast
        if self.world.device.type == "cuda" and not self.dealt and not distributed.grouped():
            ours = [o for o in self.optimizers if isinstance(o, NorMuon)]
            self.compiled = {o: compiled_step(o, tolerant([])) for o in ours}
        return time.perf_counter() - start, ""


@contextmanager
def blaming(optimizer: Optimizer) -> Iterator[None]:
    """Raise ConfigError naming the optimizer if another package's step fails."""
    try:
        yield
    except Exception as error:  # whatever a user's class may raise
        name = f"{type(optimizer).__module__}:{type(optimizer).__name__}"
        if name.startswith("nanonormuon.") or isinstance(optimizer, AdamW) or exit_code(error):
            raise
        raise ConfigError(f"optim.name = {name}: its step() fails: {describe(error)}") from error


def tolerant(failures: list[Exception]) -> Callable[..., Callable]:
    """Make a backend of torch.compile that runs a graph uncompiled if inductor fails, and appends
    the error to `failures`."""

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        try:
            return torch._dynamo.lookup_backend("inductor")(graph, inputs)
        except Exception as error:  # a compiler may raise anything
            if out_of_memory(error):
                raise
            failures.append(error)
            return graph.forward  # other ranks would wait if this one left the pass

    return backend


def compiled_step(optimizer: NorMuon, backend: str | Callable) -> Callable[[], None]:
    """Compile NorMuon's step to one graph: some 60 kernel launches instead of 134."""
    # unwrapped: a graph cannot contain the profiler's hook
    graph = torch.compile(inspect.unwrap(NorMuon.step), backend=backend, dynamic=False)
    groups, scheduled = optimizer.param_groups, ("lr", "momentum")

    @torch.no_grad()
    def step() -> None:
        rates = [{key: group[key] for key in scheduled} for group in groups]
        for group, numbers in zip(groups, rates):  # a graph would keep a number as a constant
            group |= {k: torch.tensor(x, dtype=torch.float64) for k, x in numbers.items()}
        try:
            with torch._dynamo.config.patch(suppress_errors=True):
                graph(optimizer)
        finally:
            for group, numbers in zip(groups, rates):
                group |= numbers

    return step


def grid(world: World, parallel: str) -> DeviceMesh:
    """Arrange all ranks as one dimension, or for "hsdp" as nodes x ranks of a node."""
    n = distributed.shards(parallel)
    shape = (world.size,) if parallel == "fsdp" else (world.size // n, n)
    names = ("replicate", "shard")[-len(shape) :]
    # without a mesh FSDP2 would use the machine's GPUs even if device = cpu
    return init_device_mesh(world.device.type, shape, mesh_dim_names=names)


def shard(model: GPT, mesh: DeviceMesh, dtype: torch.dtype | None, reshard: bool) -> None:
    """Shard a model in place with FSDP2, block by block (`model.layers`), over a mesh from `grid`.

    dtype: of computation, with gradients reduced in float32; None: both as in the model, which
    casts activations itself. FSDP2 shards only tensors of one dtype together, so an embedding in
    another dtype is a block of its own, and so is a router, which computes in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    reduced = dtype and torch.float32
    policy = MixedPrecisionPolicy(dtype, reduced, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(None, reduced, cast_forward_inputs=False)
    for router in (m for m in model.modules() if hasattr(m, "rebalance")):
        fully_shard(router, mesh=mesh, mp_policy=exact, reshard_after_forward=reshard)
    mixed = len({p.dtype for p in model.parameters()}) > 1
    for block in [*model.layers, *([model.embed_tokens] if mixed else []), model]:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)


class Bitwise(Engine):
    """train.canonical: bitwise equal weights on any number of ranks that divides the batch.

    Rounding depends on the order of sums, so micro-batches of a fixed size are dealt out to the
    ranks in turn and added up by their index in the batch; then every rank makes the whole update.
    Under FSDP2, each rank gathers weights and optimizer state for the update and keeps its rows.
    Every micro-batch sends whole gradients and every update whole states, so this mode is slow.
    """

    dealt = True

    def __init__(self, model: GPT, make: Make, world: World, parallel: str = "ddp", **more: Any):
        torch.set_num_threads(1)  # splitting a matmul among threads changes its rounding
        # on a GPU, so do the order of atomic additions (as in attention's backward pass) and the
        # kernels that a compiler selects by timing
        torch.use_deterministic_algorithms(True)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.make: Make = lambda model: [unshared(optimizer) for optimizer in make(model)]
        super().__init__(model, self.make, world, parallel, **more)
        self.parameters = list(model.parameters())  # as sharded between steps
        self.sums: list[Tensor] = []

    def distribute(self, dtype: torch.dtype | None, reshard: bool) -> None:
        # dtype None: FSDP2's mixed precision would cast where the model does not
        if self.sharded:
            shard(self.model, self.mesh, None, reshard)
            for module in self.shards():  # keep gathered parameters and their local gradients
                module.set_reshard_after_backward(False, recurse=False)

    def shards(self) -> list[Any]:
        return [module for module in self.model.modules() if hasattr(module, "unshard")]

    def sync(self, on: bool) -> None:
        super().sync(False)

    def backward(self, part: Tensor) -> None:
        (part / self.world.size).backward()
        if self.world.size == 1:
            return  # autograd adds in this order
        for i, p in enumerate(self.model.parameters()):
            pieces = [torch.empty_like(p) for _ in range(self.world.size)]
            dist.all_gather(pieces, p.grad)
            if i == len(self.sums):
                self.sums.append(pieces.pop(0))
            for piece in pieces:
                self.sums[i] += piece
            p.grad = None

    def accumulate(self, micro_batches: Iterator[tuple[Tensor, Tensor]], count: int) -> Tensor:
        loss = super().accumulate(micro_batches, count)
        for p, total in zip(self.model.parameters(), self.sums):
            p.grad = total
        self.sums = []
        return loss

    @torch.no_grad()
    def step(self) -> None:
        if not self.sharded:
            super().step()
            return
        for acting, kept in zip(self.make(self.model), self.optimizers):
            pass_on(kept, acting)
            with blaming(acting):
                acting.step()
            pass_on(acting, kept)

    @torch.no_grad()
    def zero_grad(self) -> None:
        super().zero_grad()
        for p, w in zip(self.parameters, list(self.model.parameters())):
            if p is not w:
                p.copy_(placed_like(w.detach(), p))
        for module in self.shards():
            module.reshard()


def unshared(optimizer: Optimizer) -> Optimizer:
    """Make every rank iterate all matrices: a smaller stack could be rounded differently."""
    if isinstance(optimizer, NorMuon) or hasattr(optimizer, "buckets"):  # also in the zoo
        for bucket in optimizer.buckets:
            bucket.layout = OneProcess()
    return optimizer


def pass_on(source: Optimizer, target: Optimizer) -> None:
    """Copy settings and state to an optimizer of another layout; every rank must call this."""
    content = source.state_dict()
    params: Sequence[Tensor] = [p for group in target.param_groups for p in group["params"]]
    for i, state in content["state"].items():
        p, content["state"][i] = params[i], {}
        for key, value in ((k, whole(v)) for k, v in state.items()):
            like = target.state[p].get(key, p if value.shape == p.shape else value)
            content["state"][i][key] = placed_like(value, like)
    target.load_state_dict(content)

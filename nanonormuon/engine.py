"""How a backward pass and an update happen: on one process, under DDP, under FSDP2, or bitwise.

The only file that knows. An engine owns the model, its optimizers and their gradients; the loop
calls `accumulate`, `clip`, `update` and `zero_grad`, whatever the layout.
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

    model: on its device. make: from a model to its optimizers. parallel: "ddp", or "fsdp" or "hsdp"
    for FSDP2, which turns the model's parameters into DTensors in place. dtype: what FSDP2 computes
    in. reshard: under FSDP2, free a block's whole weights after its forward pass. grad_clip:
    largest norm of the raw gradient; 0: no clipping. qk_clip: see runtime/qk_clip.py.
    """

    dealt = False  # whether micro-batches are dealt out to the ranks in turn, see data.Loader

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
        # whether nobody could hear of a rank that runs out of memory in a forward pass
        self.lockstep = world.size == 1 or self.sharded or self.dealt
        self.qk_clip = None
        if qk_clip:
            from nanonormuon.runtime.qk_clip import QkClip  # few runs have it

            self.qk_clip = QkClip(model, qk_clip, world.device)
        self.expert_load = None
        if model.config.mlp == "experts":
            from nanonormuon.runtime.expert_load import ExpertLoad  # nor have they these

            self.expert_load = ExpertLoad(model, world)
        self.distribute(dtype, reshard)
        self.forward: Callable[..., Tensor] = self.replica  # or its compiled form
        self.optimizers = make(model)
        self.compiled: dict[Optimizer, Callable[[], None]] = {}  # steps

    def distribute(self, dtype: torch.dtype | None, reshard: bool) -> None:
        """Make the model one of several replicas or shards; alone it stays as it is."""
        if self.sharded:
            shard(self.model, self.mesh, dtype, reshard)
        elif distributed.grouped():
            self.replica = DistributedDataParallel(
                self.model, broadcast_buffers=False, gradient_as_bucket_view=True
            )
            self.replica.require_backward_grad_sync = False  # its forward pass prepares nothing

    @property
    def evaluate(self) -> Callable[..., Tensor]:
        """The forward pass without gradients: compiled if training is, and without DDP's hooks."""
        return self.model if self.forward is self.replica else self.forward

    def state(self) -> list[Tensor]:
        """What this rank holds of all that an update changes: weights, optimizer buffers."""
        states = (s for optimizer in self.optimizers for s in optimizer.state.values())
        buffers = (t for state in states for t in state.values())
        return [*self.model.parameters(), *(t for t in buffers if isinstance(t, Tensor))]

    def accumulate(self, micro_batches: Iterator[tuple[Tensor, Tensor]], count: int) -> Tensor:
        """Add up the gradients of `count` micro-batches; returns this rank's mean loss (0-d).

        Replicas meet in the last backward pass alone. Until then a rank that runs out of memory can
        tell the others, who would otherwise wait for it there (memory.together).
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
        """Decide whether the next backward pass averages gradients over ranks.

        Called after the forward pass: until then ranks can still agree not to make the backward
        pass, which DDP, once prepared, would not forget.
        """
        if self.sharded:
            self.model.set_requires_gradient_sync(on)  # type: ignore[attr-defined]
        elif on and isinstance(self.replica, DistributedDataParallel):
            self.replica.reducer.prepare_for_backward([])  # as its own forward pass does

    def clip(self, norm: float) -> None:
        """Scale the gradients, whose norm is given, down to grad_clip."""
        if self.grad_clip:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            scale = self.grad_clip / torch.tensor(norm, device=self.world.device)
            torch._foreach_mul_(grads, scale.clamp(max=1.0))

    def update(self) -> None:
        """Make the optimizers' step, then what QK-clip and the load of experts ask for."""
        self.step()
        if self.qk_clip:
            self.qk_clip.apply()
        if self.expert_load:
            self.expert_load.apply()

    def step(self) -> None:
        """Make the optimizers' step."""
        for optimizer in self.optimizers:
            with blaming(optimizer):
                self.compiled.get(optimizer, optimizer.step)()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad(set_to_none=True)

    def compile(self, trial: Callable[[], tuple[Tensor, Tensor]]) -> tuple[float, str]:
        """Compile the forward and backward pass, if they then work on a trial batch on all ranks;
        with them, on a GPU that has no others, NorMuon's step.

        Returns the seconds that it took, and why it failed ("": it did not). No gradient is left of
        the trial. Raises what `accumulate` raises for want of memory.
        """
        start, failures = time.perf_counter(), []

        def passes() -> None:
            try:  # under FSDP2 torch itself runs what it cannot even trace uncompiled
                with torch._dynamo.config.patch(suppress_errors=self.sharded):
                    fast(*trial()).backward()
            except Exception as error:
                if self.sharded or out_of_memory(error):  # FSDP2 is in the middle of a pass
                    raise
                failures.append(error)

        fast = torch.compile(self.replica, backend=tolerant(failures), dynamic=False)
        # FSDP2 would keep an unreduced gradient where zero_grad does not reach it
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
    """Name an optimizer of another package whose step fails, by a ConfigError."""
    try:
        yield
    except Exception as error:  # whatever a user's class may raise
        name = f"{type(optimizer).__module__}:{type(optimizer).__name__}"
        if name.startswith("nanonormuon.") or isinstance(optimizer, AdamW) or exit_code(error):
            raise
        raise ConfigError(f"optim.name = {name}: its step() fails: {describe(error)}") from error


def tolerant(failures: list[Exception]) -> Callable[..., Callable]:
    """A backend of torch.compile that runs a graph as it is if inductor fails, and notes why."""

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        try:
            return torch._dynamo.lookup_backend("inductor")(graph, inputs)
        except Exception as error:  # whatever a compiler may raise; the graph itself is tested
            if out_of_memory(error):
                raise
            failures.append(error)
            return graph.forward  # a rank that left the pass would leave the others waiting

    return backend


def compiled_step(optimizer: NorMuon, backend: str | Callable) -> Callable[[], None]:
    """NorMuon's step as one graph: some 60 launches of a GPU in place of 134."""
    # without the profiler's hook, which a graph cannot contain
    graph = torch.compile(inspect.unwrap(NorMuon.step), backend=backend, dynamic=False)
    groups, scheduled = optimizer.param_groups, ("lr", "momentum")

    @torch.no_grad()
    def step() -> None:
        rates = [{key: group[key] for key in scheduled} for group in groups]
        for group, numbers in zip(groups, rates):  # a number would be a constant of the graph
            group |= {k: torch.tensor(x, dtype=torch.float64) for k, x in numbers.items()}
        try:
            with torch._dynamo.config.patch(suppress_errors=True):
                graph(optimizer)
        finally:
            for group, numbers in zip(groups, rates):
                group |= numbers

    return step


def grid(world: World, parallel: str) -> DeviceMesh:
    """All ranks in a row, or for "hsdp" nodes x ranks of a node: replicas of shards."""
    n = distributed.shards(parallel)
    shape = (world.size,) if parallel == "fsdp" else (world.size // n, n)
    names = ("replicate", "shard")[-len(shape) :]
    # without a mesh FSDP2 would take the machine's GPUs, whatever the device asked for
    return init_device_mesh(world.device.type, shape, mesh_dim_names=names)


def shard(model: GPT, mesh: DeviceMesh, dtype: torch.dtype | None, reshard: bool) -> None:
    """Shard a model in place with FSDP2, block by block (`model.layers`), as `grid` says.

    Computes in `dtype` and reduces gradients in float32, or does both as the model itself does
    (None). An embedding that rests in another dtype is a block of its own: what FSDP2 shards
    together has one dtype. So is a router, which computes in float32. The model casts activations
    itself, but for rotary tables.
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
    """train.canonical: equal weights, bit by bit, on any number of ranks that divides the batch.

    Rounding depends on the order of sums, so every sum has one order: micro-batches of a fixed size
    are dealt out to the ranks in turn and added up by their number in the batch, wherever they were
    computed; then every rank makes the whole update. What FSDP2 shards stays sharded between steps:
    for the update each rank gathers weights and optimizer state, steps, and keeps its rows. Whole
    gradients are sent for every micro-batch, whole states for every update: this mode is for
    comparisons, not for speed.
    """

    dealt = True

    def __init__(self, model: GPT, make: Make, world: World, parallel: str = "ddp", **more: Any):
        torch.set_num_threads(1)  # how a product is cut among threads decides its rounding too
        # so does, on a GPU, the order of atomic additions (in attention's backward pass, say), and
        # which kernel a compiler finds to be fastest
        torch.use_deterministic_algorithms(True)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.make: Make = lambda model: [unshared(optimizer) for optimizer in make(model)]
        super().__init__(model, self.make, world, parallel, **more)
        self.parameters = list(model.parameters())  # as they rest between steps
        self.sums: list[Tensor] = []

    def distribute(self, dtype: torch.dtype | None, reshard: bool) -> None:
        # in no other dtype: FSDP2's mixed precision casts where the model does not
        if self.sharded:
            shard(self.model, self.mesh, None, reshard)
            for module in self.shards():  # whole parameters stay, with this rank's whole gradients
                module.set_reshard_after_backward(False, recurse=False)

    def shards(self) -> list[Any]:
        return [module for module in self.model.modules() if hasattr(module, "unshard")]

    def sync(self, on: bool) -> None:
        super().sync(False)

    def backward(self, part: Tensor) -> None:
        (part / self.world.size).backward()
        if self.world.size == 1:
            return  # autograd adds in this very order
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
    """Make the whole update on every rank: products of smaller stacks could round differently."""
    if isinstance(optimizer, NorMuon) or hasattr(optimizer, "buckets"):  # the zoo's have them too
        for bucket in optimizer.buckets:
            bucket.layout = OneProcess()
    return optimizer


def pass_on(source: Optimizer, target: Optimizer) -> None:
    """Copy rates and buffers to an optimizer of another layout; every rank takes part."""
    content = source.state_dict()
    params: Sequence[Tensor] = [p for group in target.param_groups for p in group["params"]]
    for i, state in content["state"].items():
        p, content["state"][i] = params[i], {}
        for key, value in ((k, whole(v)) for k, v in state.items()):
            like = target.state[p].get(key, p if value.shape == p.shape else value)
            content["state"][i][key] = placed_like(value, like)
    target.load_state_dict(content)

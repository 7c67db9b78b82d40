"""The micro-batch size: as many sequences per forward pass as fit in memory.

`choose` finds it before the first step. A `MicroBatch` repeats a step that ran out of memory with a
smaller size; `together` notifies all ranks.
"""

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer

from nanonormuon.config import Config
from nanonormuon.errors import ConfigError, OutOfMemory, out_of_memory
from nanonormuon.model import GPT
from nanonormuon.runtime import distributed
from nanonormuon.runtime.faults import Watch
from nanonormuon.storage.files import in_units

log = logging.getLogger(__name__)
Result = TypeVar("Result")

CPU_TOKENS = 8192  # larger micro-batches are no faster on a CPU
LESS_MEMORY = "train.activation_checkpointing=true, more GPUs with train.parallel=fsdp"
SPARE = 0.05  # share of the free memory that a probe leaves for fragmentation and libraries
# an upper limit of any such device's FLOP per second
FASTEST = {"cpu": 1e14, "cuda": 1e16}


class Shortage(MemoryError):
    """Raised on all ranks if any rank has run out of memory."""


def refuse_absurd(config: Config, world: distributed.World) -> None:
    """Raise ConfigError for a run far beyond its memory or ten years. Needs its vocabulary."""
    t, ranks = config.train, world.size
    with torch.device("meta"):
        first, two = max(1, config.model.n_dense), 1 + config.model.value_embed
        few, more = (GPT(replace(config.model, n_layer=first + n)) for n in (0, two))

    def whole(count: Callable[[GPT], float]) -> float:  # linear in blocks, or in pairs of them
        return count(few) + (config.model.n_layer - first) * (count(more) - count(few)) / two

    parameters = whole(lambda model: sum(p.numel() for p in model.parameters()))
    share = 1 if t.canonical else distributed.shards(t.parallel)
    windows = 32 * t.batch_tokens // config.data.seq_len  # bytes of Batches.windows
    model = f"model: {parameters:,} parameters", 8 * parameters // share, world.device
    batch = f"train.batch_tokens = {t.batch_tokens}", windows, torch.device("cpu")
    for name, least, device in (model, batch):
        if least > 2 * (room := memory_of(device)):
            needed = f"needs at least {in_units(least)} of memory"
            raise ConfigError(f"{name}: {needed}, this {device.type} has {in_units(room)}")
    work = whole(lambda model: model.flops_per_token(config.data.seq_len)) * t.batch_tokens
    seconds = work / ranks / FASTEST.get(world.device.type, FASTEST["cpu"])
    each = f"a step of {work:.2g} FLOP on {ranks} x {world.device.type}"
    if seconds > (t.time_limit or math.inf):
        late = f"takes at least {seconds:,.0f} s, train.time_limit is {t.time_limit:g} s"
        raise ConfigError(f"train.batch_tokens = {t.batch_tokens}: {each} {late}")
    if (years := seconds * t.last_step / 31_557_600) > 10:
        raise ConfigError(f"train.steps = {t.last_step}: {each}, {years:,.0f} years at least")


def memory_of(device: torch.device) -> float:
    """Return a device's total memory in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    known = hasattr(os, "sysconf")  # not on Windows
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else math.inf


def choose(
    make: Callable[[torch.device], tuple[GPT, Sequence[Optimizer]]], config: Config, per_rank: int,
    world: distributed.World,
) -> int:  # fmt: skip
    """Return the largest divisor of per_rank, in sequences, that fits on every rank.

    On one GPU and under DDP, it is probed with a model and optimizers from `make`. Under FSDP2 it
    is estimated, with 40 % to spare: a rank that ran out of memory would leave the others waiting
    within a layer. On a CPU it is CPU_TOKENS.
    """
    candidates, T = divisors(per_rank), config.data.seq_len
    if world.device.type != "cuda":
        return max((n for n in candidates if n * T <= CPU_TOKENS), default=1)
    shards = distributed.shards(config.train.parallel)
    if shards > 1:
        model, _ = make(torch.device("meta"))
        fitting = estimate(model, config, candidates, world.device, shards)
    else:
        fitting = probe(*make(world.device), T, candidates)
    free_cache(world.device)
    torch.cuda.reset_peak_memory_stats(world.device)  # a run reports its own peak
    return -int(distributed.largest([-fitting])[0])


def estimate(
    model: GPT, config: Config, candidates: Sequence[int], device: torch.device, shards: int
) -> int:
    """Return the largest candidate that needs at most 60 % of the memory of a device, one of
    `shards` that share the weights; 1 if none does."""
    from nanonormuon.runtime import activations  # fake tensors, which other runs do not need

    m, dtype, T, t = model.config, model.compute_dtype, config.data.seq_len, config.train
    parameters = sum(p.numel() for p in model.parameters())
    free = torch.cuda.mem_get_info(device)[0]
    free -= 12 * parameters // shards  # weights, gradients, NorMuon's momentum
    if not t.reshard:  # gathered weights stay from the forward to the backward pass
        free -= parameters * dtype.itemsize

    def fits(n: int) -> bool:
        recompute = t.activation_checkpointing
        every, none = (activations.kept(m, T, B, dtype, recompute) for B in (n, 0))
        # B = 0 leaves only weights cast to `dtype`, which FSDP2 gathers in `dtype`
        needed = sum(every) - sum(none) + activations.chunk_bytes(m, n * T, dtype)
        # several micro-batches accumulate unsharded float32 gradients
        whole = 4 * parameters if n < candidates[-1] else 0
        return needed <= int(0.6 * (free - whole))

    return max(filter(fits, candidates), default=1)


def probe(
    model: GPT, optimizers: Sequence[Optimizer], seq_len: int, candidates: Sequence[int]
) -> int:
    """Return the largest of the rising `candidates` that fits, with an update and an evaluation.

    Does not compile, since torch.compile needs no more memory. Raises OutOfMemory if none fits.
    Model and optimizers are unusable afterwards.
    """
    device, fitting, spare = model.embed_tokens.weight.device, 0, None
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        spare = torch.empty(int(SPARE * free), dtype=torch.uint8, device=device)
    for n in candidates:
        try:
            tokens = torch.zeros(n, seq_len, dtype=torch.int64, device=device)
            model(tokens, tokens).backward()
            with torch.no_grad():
                model(tokens, tokens, reduction="sum")
            for optimizer in optimizers if not fitting else ():
                optimizer.step()  # creates the buffers that the optimizer still lacks
        except Exception as error:
            if not out_of_memory(error):
                raise
            break
        free_cache(device)
        fitting = n
    if not fitting:
        problem = f"{candidates[0]} sequence of {seq_len} tokens and an update do not fit"
        hint = f"try {LESS_MEMORY}, a smaller model or a smaller data.seq_len"
        raise OutOfMemory(f"out of memory: {problem}: {hint}")
    del spare
    return fitting


def free_cache(device: torch.device) -> None:
    """Return cached blocks to the device, as other sizes may be needed now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


class MicroBatch:
    """The current micro-batch size in sequences: equal on all ranks, a divisor of `per_rank`.
    engine: an engine.Engine. again: the command that continues the run."""

    def __init__(self, size: int, per_rank: int, engine: Any, watch: Watch, again: str):
        self.size, self.per_rank, self.engine = size, per_rank, engine
        self.watch, self.again = watch, again

    @property
    def count(self) -> int:
        """Number of micro-batches per rank and step."""
        return self.per_rank // self.size

    def retry(self, accumulate: Callable[[], Result]) -> Result:
        """Accumulate a step's gradients, with smaller micro-batches if memory runs out. The batch
        size does not change, and neither does the loss curve."""
        while True:
            try:
                return accumulate()
            except Exception as error:
                if not out_of_memory(error):
                    raise
                everywhere = self.engine.world.size == 1 or isinstance(error, Shortage)
                cause = str(error)
            self.shrink(everywhere, cause)  # outside `except`, whose traceback keeps tensors alive

    def shrink(self, everywhere: bool, cause: str) -> None:
        """Take the next divisor at or below half the size, or raise OutOfMemory. Its attribute
        `everywhere` is true if all ranks raise it and can still save together."""
        world = self.engine.world
        self.engine.model.zero_grad(set_to_none=True)
        free_cache(world.device)
        fewer = max(n for n in divisors(self.per_rank) if n <= max(1, self.size // 2))
        if not everywhere or self.engine.dealt or fewer == self.size:
            advice = f"continue with: {self.again} train.micro_batch={fewer}"
            if fewer == self.size:
                advice = f"the micro-batch is one sequence already; continue with: {self.again} "
                advice += f"{LESS_MEMORY}, or a machine with more memory"
            error = OutOfMemory(f"out of memory{cause and ': '}{cause}; {advice}")
            error.everywhere = everywhere
            raise error
        if world.first:
            problem = f"step {self.watch.step}: out of memory with micro-batches of {self.size}"
            now = f"repeating the step and continuing with {fewer}; the batch size is unchanged"
            log.warning(f"{problem}; {now}")
        self.size = fewer


def divisors(n: int) -> list[int]:
    """Return the divisors of n >= 1 in increasing order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def together(work: Callable[[], Result], alone: bool = False) -> Result:
    """Return the result of `work`, or raise Shortage on all ranks if any ran out of memory.

    Every rank must call this. alone: raise this rank's own error without asking other ranks,
    because there are none or they wait for this one inside `work`.
    """
    if alone:
        return work()
    result, short = None, True
    try:
        result, short = work(), False
    except Exception as error:
        if not out_of_memory(error):
            raise
    if distributed.largest([short])[0]:
        raise Shortage  # outside `except`, whose traceback keeps tensors alive
    return result  # type: ignore[return-value]

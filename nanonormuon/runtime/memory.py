"""How many sequences go through the model at a time: as many as fit, and fewer once they do not.

`choose` decides before the first step. In the run a `MicroBatch` repeats a step that ran out of
memory with fewer; `together` lets every rank learn that one of them did.
"""

import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch.optim import Optimizer

from nanonormuon.config import divisors
from nanonormuon.errors import OutOfMemory, out_of_memory
from nanonormuon.model import GPT
from nanonormuon.runtime import activations, distributed
from nanonormuon.runtime.faults import Watch

log = logging.getLogger(__name__)
Result = TypeVar("Result")

CPU_TOKENS = 8192  # more at a time gains nothing on a CPU, and a GPU's probe begins far above
SPARE = 0.05  # of the free memory, kept free in a probe: fragments, and what libraries take later


class Shortage(MemoryError):
    """A rank has run out of memory, and every rank knows."""


def choose(
    make: Callable[[], tuple[GPT, Sequence[Optimizer]]],
    seq_len: int,
    per_rank: int,
    world: distributed.World,
    sharded: bool = False,
    recompute: bool = False,
) -> int:
    """The largest divisor of per_rank, in sequences, that fits on every rank.

    On one GPU and under DDP a probe finds it: training steps, an evaluation and an update of a
    model that `make` makes for the purpose, with its optimizers. Under FSDP2 a rank that fails
    would leave the others waiting in the middle of a layer, so there it is an estimate: what the
    layers keep for their backward pass, with 40 % to spare. On a CPU it is 8,192 tokens' worth.
    """
    candidates = divisors(per_rank)
    if world.device.type != "cuda":
        return max((n for n in candidates if n * seq_len <= CPU_TOKENS), default=1)
    if sharded:
        with torch.device("meta"):
            model, _ = make()
        fitting = estimate(model, seq_len, candidates, world, recompute)
    else:
        fitting = probe(*make(), seq_len, candidates)
    free_cache(world.device)
    return -int(distributed.largest([-fitting], world.device)[0])


def estimate(
    model: GPT,
    seq_len: int,
    candidates: Sequence[int],
    world: distributed.World,
    recompute: bool = False,
) -> int:
    """The largest of the candidates that 60 % of the memory has room for; 1 if none."""
    m, dtype = model.config, model.compute_dtype

    def needed(n: int) -> int:
        every, none = (activations.kept(m, seq_len, B, dtype, recompute) for B in (n, 0))
        # what no sequence keeps is the weights in the dtype of products, which FSDP2 gathers so
        return sum(every) - sum(none) + activations.chunk_bytes(m, n * seq_len, dtype)

    own = 12 * sum(p.numel() for p in model.parameters()) // world.size  # gradients, optimizer
    room = int(0.6 * (torch.cuda.mem_get_info(world.device)[0] - own))
    return max((n for n in candidates if needed(n) <= room), default=1)


def probe(
    model: GPT,
    optimizers: Sequence[Optimizer],
    seq_len: int,
    candidates: Sequence[int],
) -> int:
    """The largest of the rising `candidates` for which a step and an evaluation have memory.

    Without torch.compile, which needs no more. Raises OutOfMemory if there is too little for the
    first and an update. Model and optimizers are of no use afterwards.
    """
    device = model.embed_tokens.weight.device

    def trial(n: int) -> None:
        tokens = torch.zeros(n, seq_len, dtype=torch.int64, device=device)
        model(tokens, tokens).backward()
        with torch.no_grad():
            model(tokens, tokens, reduction="sum")

    def first() -> None:
        trial(candidates[0])
        for optimizer in optimizers:
            optimizer.step()  # from here on all buffers exist

    def fits(work: Callable[[], None]) -> bool:
        try:
            work()
        except Exception as error:
            if not out_of_memory(error):
                raise
            return False
        finally:
            free_cache(device)
        return True

    spare = None
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        spare = torch.empty(int(SPARE * free), dtype=torch.uint8, device=device)
    low, high = 0, len(candidates)
    if not fits(first):
        raise OutOfMemory(
            f"out of memory: {candidates[0]} sequence of {seq_len} tokens and an update do not "
            "fit: set train.activation_checkpointing=true, take more GPUs and "
            "train.parallel=fsdp, or a smaller model or data.seq_len"
        )
    while low + 1 < high:
        middle = (low + high) // 2
        if fits(lambda: trial(candidates[middle])):  # noqa: B023, called at once
            low = middle
        else:
            high = middle
    del spare
    return candidates[low]


def free_cache(device: torch.device) -> None:
    """Return freed blocks, whose sizes may suit nothing any more, to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------
# During the run


class MicroBatch:
    """Sequences per device at a time, equal on all ranks and a divisor of `per_rank`.

    fixed: it may not shrink, since train.canonical adds up micro-batches of one size.
    """

    def __init__(
        self, size: int, per_rank: int, model: GPT, world: distributed.World, watch: Watch,
        run: Path, fixed: bool = False,
    ):  # fmt: skip
        self.size, self.per_rank, self.model, self.world = size, per_rank, model, world
        self.watch, self.run, self.fixed = watch, run, fixed

    @property
    def count(self) -> int:
        """Micro-batches per rank and step."""
        return self.per_rank // self.size

    def retry(self, accumulate: Callable[[], Result]) -> Result:
        """Accumulate a step's gradients, with smaller micro-batches each time that memory runs out:
        the batch, and so the loss curve, stays what it is."""
        while True:
            try:
                return accumulate()
            except Exception as error:
                if not out_of_memory(error):
                    raise
                everywhere = self.world.size == 1 or isinstance(error, Shortage)
                cause = str(error)
            self.shrink(everywhere, cause)  # outside the handler, whose traceback keeps tensors

    def shrink(self, everywhere: bool, cause: str) -> None:
        """Halve the size, or raise OutOfMemory; its attribute `everywhere` says whether all ranks
        raise it, and so can still save together."""
        self.model.zero_grad(set_to_none=True)
        free_cache(self.world.device)
        fewer = smaller(self.size, self.per_rank)
        if not everywhere or self.fixed or fewer == self.size:
            error = OutOfMemory(f"out of memory{cause and ': '}{cause}; {self.advice(fewer)}")
            error.everywhere = everywhere  # type: ignore[attr-defined]
            raise error
        if self.world.first:
            log.warning(
                f"step {self.watch.step}: out of memory with {self.size} sequences at a time; "
                f"repeated, and from here on, with {fewer}; the batch stays as it is"
            )
        self.size = fewer

    def advice(self, fewer: int) -> str:
        again = f"normuon-train run --resume --out {shlex.quote(str(self.run))}"
        if fewer < self.size:
            return f"go on from the last checkpoint with: {again} train.micro_batch={fewer}"
        return (
            "less than one sequence at a time is impossible; go on from the last checkpoint with "
            f"{again} train.activation_checkpointing=true, on more GPUs with train.parallel=fsdp, "
            "or where there is more memory"
        )


def smaller(size: int, per_rank: int) -> int:
    """The largest divisor of per_rank that is at most half as large; 1 for 1."""
    return max(n for n in divisors(per_rank) if n <= max(1, size // 2))


def together(work: Callable[[], Result], alone: bool = False) -> Result:
    """Return what `work` returns if all ranks had memory for it; else raise Shortage on all.

    Every rank must call this. alone: nobody could be told of a failure, since there is one rank or
    the ranks wait for each other inside `work`; an error is raised as it is.
    """
    if alone:
        return work()
    result, short = None, False
    try:
        result = work()
    except Exception as error:
        if not out_of_memory(error):
            raise
        short = True
    if distributed.any_rank(short):
        raise Shortage  # outside the handler, whose traceback keeps tensors alive
    return result  # type: ignore[return-value]

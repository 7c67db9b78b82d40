"""How many sequences go through the model at a time: as many as fit, and fewer once they do not.

`choose` decides before the first step. In the run a `MicroBatch` repeats a step that ran out of
memory with fewer; `together` lets every rank learn that one of them did.
"""

import json
import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from nanonormuon.errors import OutOfMemory, out_of_memory
from nanonormuon.model import GPT
from nanonormuon.runtime import activations, distributed
from nanonormuon.runtime.faults import Watch
from nanonormuon.storage import files
from nanonormuon.storage.files import replace_file
from nanonormuon.storage.tensors import local

log = logging.getLogger(__name__)
Result = TypeVar("Result")

CPU_TOKENS = 8192  # more at a time gains nothing on a CPU, and a GPU's probe begins far above
SPARE = 0.05  # of the free memory, kept free in a probe: fragments, and what libraries take later


class Shortage(MemoryError):
    """Some rank has run out of memory, and every rank knows."""


def divisors(n: int) -> list[int]:
    """The numbers that divide n, rising."""
    return [d for d in range(1, n + 1) if n % d == 0]


def choose(
    model: GPT,
    optimizers: Sequence[torch.optim.Optimizer],
    seq_len: int,
    per_rank: int,
    world: distributed.World,
    parallel: str = "ddp",
    recompute: bool = False,
) -> int:
    """The largest divisor of per_rank, in sequences, that fits on every rank.

    On one GPU and under DDP it is found by a probe of training steps, evaluation and optimizer on
    this model, remembered in the cache directory; the model and its optimizers must be new, and are
    so again afterwards. Under FSDP2 a rank that fails would leave the others waiting in the middle
    of a layer, so it is an estimate there: what the layers keep for their backward pass, with 40 %
    to spare. On a CPU it is what 8,192 tokens are.
    """
    candidates = divisors(per_rank)
    if world.device.type != "cuda":
        return max((n for n in candidates if n * seq_len <= CPU_TOKENS), default=1)
    if parallel == "fsdp" and world.size > 1:
        fitting = estimate(model, seq_len, candidates, world, recompute)
        return -int(distributed.largest([-fitting], world.device)[0])
    key = key_of(model, optimizers, seq_len, per_rank, world, recompute)
    known = distributed.first_does(lambda: read_cache().get(key), world.device)
    if known in candidates:
        return known
    fitting = probe(model, optimizers, seq_len, candidates)
    fitting = -int(distributed.largest([-fitting], world.device)[0])
    distributed.first_does(lambda: write_cache(key, fitting), world.device)
    return fitting


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
    optimizers: Sequence[torch.optim.Optimizer],
    seq_len: int,
    candidates: Sequence[int],
) -> int:
    """The largest of the rising `candidates` that a step and an evaluation have memory for.

    Without torch.compile, whose own memory is no more. Raises OutOfMemory if not even the first
    has; an optimizer step is part of that.
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

    with new_again(model, optimizers):
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
    free_cache(device)
    return candidates[low]


@contextmanager
def new_again(model: GPT, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """Within this a new model and its optimizers may step; then they are as new. After an error
    they are not, since nothing goes on with them."""
    weights = [local(p).detach().to("cpu", copy=True) for p in model.parameters()]
    unborn = [optimizer for optimizer in optimizers if not optimizer.state]
    yield
    with torch.no_grad():
        for p, value in zip(model.parameters(), weights):
            local(p).copy_(value)
            p.grad = None
        for optimizer in optimizers:
            if optimizer in unborn:
                optimizer.state.clear()
            for buffers in optimizer.state.values():
                for buffer in buffers.values():
                    buffer.zero_()


def free_cache(device: torch.device) -> None:
    """Return freed blocks, whose sizes may suit nothing any more, to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def key_of(
    model: GPT,
    optimizers: Sequence[torch.optim.Optimizer],
    seq_len: int,
    per_rank: int,
    world: distributed.World,
    recompute: bool,
) -> str:
    """All that the result of a probe depends on, but for other processes on the device."""
    properties = torch.cuda.get_device_properties(world.device)
    return json.dumps(
        {
            "model": asdict(model.config),
            "document_mask": model.separator is not None,
            "optimizers": [type(optimizer).__name__ for optimizer in optimizers],
            "activation_checkpointing": recompute,
            "seq_len": seq_len,
            "per_rank": per_rank,
            "ranks": world.size,
            "dtype": str(model.compute_dtype),
            "device": [properties.name, properties.total_memory],
            "torch": torch.__version__,
        },
        sort_keys=True,
    )


def cache_file() -> Path:
    return files.cache_directory() / "micro-batch.json"


def read_cache() -> dict[str, Any]:
    try:
        found = json.loads(cache_file().read_bytes())
    except (OSError, ValueError):  # a cache: whatever is wrong with it, probing is right
        return {}
    return found if isinstance(found, dict) else {}


def write_cache(key: str, fitting: int) -> None:
    try:
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(read_cache() | {key: fitting}, indent=1)
        replace_file(cache_file(), content.encode())
    except OSError as error:
        log.warning("the micro-batch that fits is not remembered: %s", error)


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

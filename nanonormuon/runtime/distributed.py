"""One process or many: start, sums over ranks, work that one rank does for all, finish.

Without torchrun's environment variables there is one rank and no process group, and every function
here is the identity. Nothing assumes that the ranks share a machine.
"""

import ctypes
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanonormuon.errors import PeerError, exit_code


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this rank writes the files and speaks."""
        return self.rank == 0


def size() -> int:
    """Number of ranks that torchrun announced; known before anything is started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(device: str = "auto", timeout: float = 1800.0) -> World:
    """Choose this rank's device and join the process group, if there are others.

    timeout: seconds that one collective may take.
    Raises ValueError if the device asked for is not there.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise ValueError(f'device "{device}": expected one of auto, cpu, cuda, mps')
    if device == "auto":
        mps = torch.backends.mps.is_available() and size() == 1
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device == "cuda":
        found = torch.cuda.device_count()
        if local_rank >= found:
            raise ValueError(
                f"train.device = cuda: rank {local_rank} of this machine needs a GPU of its own, "
                f"found {found}; start fewer processes or set train.device=cpu"
            )
        torch.cuda.set_device(local_rank)
        where = torch.device("cuda", local_rank)
    elif device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("train.device = mps: not available here; set train.device=cpu")
    else:
        where = torch.device(device)
    if where.type == "cpu":
        keep_freed_memory()
        if size() > 1 and os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's own choice
            local = int(os.environ.get("LOCAL_WORLD_SIZE", size()))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    if size() > 1 and not dist.is_initialized():
        # gloo beside NCCL: what concerns only the CPUs must not wait for the GPUs (any_rank)
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        device_id = where if where.type == "cuda" else None
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), device_id=device_id)
    return World(int(os.environ.get("RANK", "0")), size(), where)


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks instead of returning them to the system.

    Otherwise each activation of each step is mapped and zeroed afresh, page by page: a third of an
    eager training step on a CPU.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: the most that it takes
            libc.mallopt(-2, 1 << 26)  # M_TOP_PAD: grow in steps of 64 MB


def finish() -> None:
    """Wait for all ranks at the end of a run.

    The group is left standing: taking gloo's threads down has been seen to abort a process, and the
    process ends now anyway (cli.app.entry).
    """
    if size() > 1:
        dist.barrier()


def compute_dtype(wish: str, device: torch.device) -> torch.dtype:
    """auto -> bfloat16 where the device multiplies it natively, else float32."""
    if wish == "auto":
        if device.type == "cuda":
            native = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
            native = device.type == "cpu" and any(
                getattr(torch.cpu, check, lambda: False)() for check in checks
            )
        wish = "bf16" if native else "fp32"
    return torch.bfloat16 if wish == "bf16" else torch.float32


def total(x: Tensor) -> Tensor:
    """The sum over ranks."""
    if size() > 1:
        dist.all_reduce(x)
    return x


def largest(values: Sequence[float] | Tensor, device: torch.device) -> list[float]:
    """Element-wise maximum over ranks, so that all reach one verdict."""
    x = torch.as_tensor(values, dtype=torch.float32, device=device)
    if size() > 1 and len(x):
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x.tolist()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank. The ranks' CPUs wait for each other, no device does."""
    if size() == 1:
        return flag
    x = torch.tensor(int(flag))
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return bool(x)


def gather(x: Tensor) -> Tensor:
    """(ranks, *x.shape): every rank's x, of one shape on all of them."""
    everyone = [torch.empty_like(x) for _ in range(size())]
    if size() > 1:
        dist.all_gather(everyone, x)
    return torch.stack(everyone) if size() > 1 else x[None]


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that any rank has held at once since its process began: tensors on a GPU, else
    the whole process. None where the system does not tell. Every rank must call this."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        try:
            import resource
        except ImportError:  # Windows
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(gather(torch.tensor(peak, device=device)).max())


def first_does(work: Callable[[], Any], device: torch.device) -> Any:
    """Run `work` on rank 0 alone; its result (anything JSON can say) or failure reaches all."""
    failure, answer = None, {}
    if not int(os.environ.get("RANK", "0")):
        try:
            answer = {"value": work()}
        except BaseException as error:  # also a signal's: the others wait for an answer
            failure = error
            answer = {"error": str(error), "exit_code": exit_code(error) or 7}
    answer = from_first(answer, device)
    if failure is not None:
        raise failure
    if "error" in answer:
        raise PeerError(f"rank 0: {answer['error']}", answer["exit_code"])
    return answer["value"]


def from_first(value: Any, device: torch.device) -> Any:
    """Rank 0's value (anything JSON can say) on every rank."""
    if size() == 1:
        return value
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    length = torch.tensor([len(text)], device=device)
    dist.broadcast(length, 0)
    if dist.get_rank():
        text = torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(text, 0)
    return json.loads(bytes(text.tolist()))

"""What ranks do together: start, sum, broadcast rank 0's work, finish.

Without torchrun there is one rank and no process group, and the collectives do nothing. torchrun
makes a process group even for one process, so one GPU can test them. Tensors of a device go through
its backend, Python values through gloo, which does not wait for GPUs.
"""

import ctypes
import json
import logging
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

from nanonormuon.errors import ConfigError, PeerError, exit_code


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and log lines."""
        return self.rank == 0


ALONE = World(0, 1, torch.device("cpu"))


def size() -> int:
    """Return the number of ranks, known from torchrun before the process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_size() -> int:
    """Return the number of ranks on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size()))


def grouped() -> bool:
    """Whether this rank has joined a process group."""
    return dist.is_available() and dist.is_initialized()


def shards(parallel: str) -> int:
    """Return the number of ranks that share a copy of the weights."""
    return {"fsdp": size(), "hsdp": local_size()}.get(parallel, 1)


def start(device: str = "auto", timeout: float = 1800.0) -> World:
    """Choose this rank's device and join the process group, if any. Ranks other than 0 then log
    only warnings. timeout: of collectives, in seconds. Raises ConfigError if the device is not
    available."""
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    if rank:
        logging.getLogger("nanonormuon").setLevel(logging.WARNING)
    mps = int(torch.backends.mps.is_available())
    found = {"cpu": size(), "cuda": torch.cuda.device_count(), "mps": mps}
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if mps and size() == 1 else "cpu"
    if device not in found:
        raise ConfigError(f'device "{device}": expected one of auto, {", ".join(found)}')
    if local_rank >= found[device]:
        problem = f"expected {local_rank + 1} or more such devices, found {found[device]}"
        hint = "start fewer processes or set train.device=cpu"
        raise ConfigError(f"train.device = {device}: {problem}; {hint}")
    where, backend = torch.device(device), "gloo"
    if device == "cuda":
        where, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(where)
    if device == "cpu":
        keep_freed_memory()
        if size() > 1 and os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's default
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size()))
    if (size() > 1 or dist.is_torchelastic_launched()) and not dist.is_initialized():
        device_id = where if device == "cuda" else None
        limit = timedelta(seconds=timeout)
        try:
            dist.init_process_group(backend, timeout=limit, device_id=device_id)
        except ValueError as error:  # such as a missing MASTER_ADDR
            raise ConfigError(str(error)) from None
    return World(rank, size(), where)


def keep_freed_memory() -> None:
    """Make glibc keep large freed blocks instead of returning them to the system. Otherwise every
    step maps and zeroes its pages again, a third of an eager step's time on a CPU."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0)  # M_MMAP_MAX: never map blocks individually
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: the maximum
            libc.mallopt(-2, 1 << 26)  # M_TOP_PAD: grow by 64 MB


def finish() -> None:
    """Wait for all ranks at the end of a run. Does not destroy the process group: stopping gloo's
    threads can abort the process."""
    if grouped():
        dist.barrier()


def compute_dtype(wish: str, device: torch.device) -> torch.dtype:
    """Resolve train.dtype; auto: bfloat16 if the device multiplies it natively, else float32."""
    if wish == "auto":
        if device.type == "cuda":
            native = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
            checks = (getattr(torch.cpu, name, bool) for name in names)  # bool() is False
            native = device.type == "cpu" and any(check() for check in checks)
        wish = "bf16" if native else "fp32"
    return torch.bfloat16 if wish == "bf16" else torch.float32


def total(x: Tensor) -> Tensor:
    """Sum x over ranks, in place."""
    if grouped():
        dist.all_reduce(x)
    return x


def largest(values: Sequence[float]) -> list[float]:
    """Return the element-wise maximum over ranks, in float32. True is 1."""
    x = torch.tensor(values, dtype=torch.float32)
    if grouped() and len(x):
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x.tolist()


def gather(x: Tensor) -> Tensor:
    """Return every rank's x, (ranks, *x.shape). Shapes must be equal."""
    if not grouped():
        return x[None]
    everyone = [torch.empty_like(x) for _ in range(size())]
    dist.all_gather(everyone, x)
    return torch.stack(everyone)


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory in bytes, the largest of all ranks: of tensors on a GPU, else of the
    process; None if the system does not report it. Every rank must call this."""
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


def first_does(work: Callable[[], Any]) -> Any:
    """Run `work` on rank 0 alone. Every rank returns its result, a JSON value, or raises."""
    failure, answer = None, {}
    if not int(os.environ.get("RANK", "0")):
        try:
            answer = {"value": work()}
        except BaseException as error:  # even Interrupted: other ranks wait for an answer
            failure = error
            answer = {"error": str(error), "exit_code": exit_code(error) or 7}
    answer = from_first(answer)
    if failure is not None:
        raise failure
    if "error" in answer:
        raise PeerError(f"rank 0: {answer['error']}", answer["exit_code"])
    return answer["value"]


def from_first(value: Any) -> Any:
    """Return rank 0's JSON value on every rank. (Unpickling it from a socket could run code.)"""
    if not grouped():
        return value
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    length = torch.tensor([len(text)])
    dist.broadcast(length, 0)
    if dist.get_rank():
        text = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(text, 0)
    return json.loads(bytes(text.tolist()))


def check_alike(found: dict[str, Any], world: World) -> None:
    """Raise ConfigError on all ranks unless `found` (name -> JSON value) is equal on all: each node
    has its own command line and perhaps its own copy of the data."""
    first = from_first(found)
    odd = [f"{k} = {v}, not {first.get(k)}" for k, v in found.items() if v != first.get(k)]
    if largest([bool(odd)])[0]:
        where = f"rank {world.rank} has {'; '.join(odd) or 'them'}"
        error = ConfigError(f"expected rank 0's settings and data on all ranks; {where}")
        error.follows = not odd  # type: ignore[attr-defined]
        raise error


def check_nodes(parallel: str, world: World) -> None:
    """Raise ConfigError on all ranks if train.parallel = hsdp without several nodes of equally many
    ranks, at least two, numbered node by node. Every rank must call this."""
    if parallel != "hsdp":
        return
    local, rank = local_size(), int(os.environ.get("LOCAL_RANK", "0"))
    odd = world.size % local or world.rank % local != rank
    odd, many, few = largest([odd, local, -local])
    if odd or many != -few or local in (1, world.size):
        found = f"found {-few:g} to {many:g} on a node, {world.size} in all"
        expected = "expected torchrun to start several ranks, equally many, on each of several"
        expected += " nodes, numbered node by node"
        raise ConfigError(f"train.parallel = hsdp: {expected}, {found}; or set train.parallel=fsdp")

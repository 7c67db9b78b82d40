"""What this machine offers, what a run would choose here, what to fix. Each check returns what it
found, and how to fix it, or "" if nothing is wrong."""

import os
import platform
import shutil
import tempfile
from contextlib import suppress
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanonormuon.build import COMPILE_FROM
from nanonormuon.runtime import distributed
from nanonormuon.storage.files import cache_directory

GB = 1 << 30
REQUIRED = ("torch", "typer", "rich", "tiktoken", "numpy", "safetensors", "tqdm", "rustbpe")
OPTIONAL = ("transformers", "matplotlib", "tensorboard", "wandb", "pyarrow", "ijson")
NEEDED = ("packages", "handshake")  # runs fail without these, and do worse without the others
Outcome = tuple[str, str]


def examine() -> list[dict[str, str]]:
    """Run all checks, in the order in which a run depends on them; status: ok, warn or fail."""
    checks = (python, packages, extras, device, precision, attention, compile_, disk,
              shared_memory, backends, handshake)  # fmt: skip
    findings = []
    for check in checks:
        name = check.__name__.replace("_", " ").strip()
        try:
            found, fix = check()
            status = "ok" if not fix else "fail" if name in NEEDED else "warn"
        except Exception as error:  # a check that breaks is a finding too
            status, found, fix = "fail", f"{type(error).__name__}: {error}", ""
        findings.append({"check": name, "status": status, "found": found, "fix": fix})
    return findings


def describe(findings: list[dict[str, str]]) -> str:
    """The findings as text: a line each, and another for the fix."""
    lines = []
    for finding in findings:
        lines.append("{status:<5} {check:<14} {found}".format(**finding))
        if finding["fix"]:
            lines.append(f"{'':<20} -> {finding['fix']}")
    return "\n".join(lines)


def python() -> Outcome:
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}", ""


def packages() -> Outcome:
    found = ", ".join(f"{name} {version(name)}" for name in REQUIRED)
    missing = [name for name in REQUIRED if version(name) == "missing"]
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 11):
        missing.append("'torch>=2.11'")
    return found, f"pip install {' '.join(missing)}" if missing else ""


def extras() -> Outcome:
    found = ", ".join(f"{name} {version(name)}" for name in OPTIONAL)
    return f"{found} (needed only by the commands that ask for them)", ""


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def device() -> Outcome:
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        form = "{0.name}, capability {0.major}.{0.minor}, {1:.0f} GB"
        names = "; ".join(form.format(gpu, gpu.total_memory / GB) for gpu in gpus)
        free = torch.cuda.mem_get_info()[0]
        fix = "another process fills the GPU: see nvidia-smi" if free < 2 * GB else ""
        found = f"cuda: {names}; {free / GB:.1f} GB free on the first"
    elif torch.backends.mps.is_available():
        found, fix = "mps (Apple GPU)", ""
    else:
        found = f"cpu: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
        driver = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists()
        build = f"torch {torch.__version__} cannot use the NVIDIA driver"
        fix = f"{build}: install torch's CUDA build for this driver" if driver else ""
    return found, fix


def precision() -> Outcome:
    dtype = distributed.compute_dtype("auto", distributed.start().device)
    native = "compute capability 8.0 or higher, AVX-512 bf16 or AMX"
    return f"{str(dtype).removeprefix('torch.')}; bfloat16 is faster only with {native}", ""


def attention() -> Outcome:
    usable, where = [], distributed.start().device
    q = torch.zeros(1, 2, 64, 64, dtype=distributed.compute_dtype("auto", where), device=where)
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        with suppress(RuntimeError), sdpa_kernel(getattr(SDPBackend, name)):
            torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
            usable.append(name.removesuffix("_ATTENTION").lower())
    found = f"scaled_dot_product_attention through {', '.join(usable)}"
    fix = "memory is quadratic in data.seq_len: shorten it" if usable == ["math"] else ""
    return found, fix


def compile_() -> Outcome:
    """What train.compile = auto does, and whether torch.compile finds its tools."""
    kind = distributed.start().device.type
    tool = next(filter(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++")), "")
    least = COMPILE_FROM.get(kind)
    when = f"runs of {least:.0e} FLOP and more" if least else f"nothing on {kind}"
    found = f"train.compile = auto: compiles {when}; {tool or 'no C++ compiler'}"
    if kind == "cuda":
        found += f", triton {version('triton')}"
        if version("triton") == "missing" or not shutil.which(os.environ.get("CC", "gcc")):
            return found, "install triton and gcc, or runs are not compiled"
    return found, "install g++, or long runs take longer" if kind == "cpu" and not tool else ""


def disk() -> Outcome:
    cache, here = cache_directory(), Path.cwd()
    cache = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = {folder: shutil.disk_usage(folder).free / GB for folder in (cache, here)}
    found = f"{free[cache]:.1f} GB free in the cache, {free[here]:.1f} GB free here"
    found += "; a checkpoint takes about 12 bytes per parameter"
    for folder in free:
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not writable: choose another directory")
    full = [str(folder) for folder, size in free.items() if size < 1]
    return found, f"make room in {' and '.join(full)}" if full else ""


def shared_memory() -> Outcome:
    if not os.path.isdir("/dev/shm"):
        return "no /dev/shm on this system, none needed", ""
    free = shutil.disk_usage("/dev/shm").free / GB
    scarce = free < 0.25 and torch.cuda.device_count() > 1
    fix = "NCCL passes data between GPUs through it: docker run --shm-size=1g" if scarce else ""
    return f"{free:.2f} GB free in /dev/shm", fix


def backends() -> Outcome:
    here = [n for n in ("nccl", "gloo") if dist.is_backend_available(n)]
    found = f"torch.distributed with {', '.join(here) or 'none'}"
    lacking = "gloo" not in here or (torch.cuda.device_count() > 1 and "nccl" not in here)
    fix = "runs of several processes need another build of torch" if lacking else ""
    return found, fix


def meet(rank: int, meeting: str, backend: str) -> None:
    """Sum a tensor with the other process of a handshake; meeting: the file to find it by."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    limit, where = timedelta(seconds=60), f"file://{meeting}"
    dist.init_process_group(backend, where, limit, world_size=2, rank=rank)
    x = torch.full((1000,), rank + 1.0, device=device)
    dist.all_reduce(x)
    os._exit(0 if bool((x == 3).all()) else 1)


def handshake(seconds: float = 90.0) -> Outcome:
    """Check that two processes can sum a tensor."""
    backend = "nccl" if torch.cuda.device_count() > 1 and dist.is_nccl_available() else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        meeting = os.path.join(folder, "meeting")
        pair = mp.start_processes(meet, (meeting, backend), nprocs=2, join=False)
        try:
            agreed = pair.join(seconds) or pair.join(seconds)  # one ends, then the other
            problem = "" if agreed else f"no answer in {seconds:.0f} s"
        except Exception as error:  # of one of the processes
            problem = str(error).strip().splitlines()[-1]
        finally:
            for process in pair.processes:
                process.kill()
                process.join()
    if not problem:
        return f"two processes agreed through {backend}", ""
    return f"{backend}: {problem}", "for runs of several processes: check host name and firewall"

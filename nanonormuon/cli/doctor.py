"""What this machine offers, what a run would choose on it, and what to fix.

A check returns its status (ok; warn: a run works, but; fail), what it found, and how to fix it.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from nanonormuon.build import COMPILE_FROM
from nanonormuon.runtime import distributed
from nanonormuon.storage.files import cache_directory

GB = 1 << 30
REQUIRED = ("torch", "typer", "tiktoken", "numpy", "safetensors", "tqdm", "rustbpe")
OPTIONAL = ("transformers", "matplotlib", "tensorboard", "wandb", "pyarrow", "ijson")
Outcome = tuple[str, str, str]


def examine() -> list[dict[str, str]]:
    """Make all checks, in the order in which a run would meet them."""
    checks = (python, packages, extras, device, precision, attention, compile_, disk,
              shared_memory, backends, handshake)  # fmt: skip
    findings = []
    for check in checks:
        try:
            outcome = check()
        except Exception as error:  # a check that breaks is a finding too
            outcome = "fail", f"{type(error).__name__}: {error}", ""
        name = check.__name__.replace("_", " ").strip()
        findings.append(dict(zip(("check", "status", "found", "fix"), (name, *outcome))))
    return findings


def describe(findings: list[dict[str, str]]) -> str:
    """Findings for people, a line each and one more for a fix."""
    lines = []
    for finding in findings:
        lines.append("{status:<5} {check:<14} {found}".format(**finding))
        if finding["fix"]:
            lines.append(f"{'':<20} -> {finding['fix']}")
    return "\n".join(lines)


def python() -> Outcome:
    return "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}", ""


def packages() -> Outcome:
    missing = [name for name in REQUIRED if version(name) == "missing"]
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 10):
        missing.append("'torch>=2.10'")
    found = ", ".join(f"{name} {version(name)}" for name in REQUIRED)
    return ("fail", found, f"pip install {' '.join(missing)}") if missing else ("ok", found, "")


def extras() -> Outcome:
    found = ", ".join(f"{name} {version(name)}" for name in OPTIONAL)
    return "ok", f"{found} (needed only by the commands that ask for them)", ""


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def device() -> Outcome:
    if torch.cuda.is_available():
        gpus = []
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            gpus.append(f"{p.name}, capability {p.major}.{p.minor}, {p.total_memory / GB:.0f} GB")
        free = torch.cuda.mem_get_info()[0]
        found = f"cuda: {'; '.join(gpus)}; {free / GB:.1f} GB free on the first"
        if free < 2 * GB:
            return "warn", found, "another process fills the GPU: see nvidia-smi"
        return "ok", found, ""
    if torch.backends.mps.is_available():
        return "ok", "mps (Apple GPU)", ""
    found = f"cpu: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists():
        fix = f"torch {torch.__version__} cannot use the NVIDIA driver: install torch's CUDA build"
        return "warn", found, f"{fix} for this driver"
    return "ok", found, ""


def chosen() -> torch.device:
    """The device that train.device = auto takes, found without joining other ranks."""
    mps = torch.backends.mps.is_available()
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")


def precision() -> Outcome:
    dtype = str(distributed.compute_dtype("auto", chosen())).removeprefix("torch.")
    native = "compute capability 8.0 or higher, AVX-512 bf16 or AMX"
    return "ok", f"{dtype}; bfloat16 is faster only with {native}", ""


def attention() -> Outcome:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    usable, where = [], chosen()
    dtype = distributed.compute_dtype("auto", where)
    q = torch.zeros(1, 2, 64, 64, dtype=dtype, device=where)
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        with suppress(RuntimeError, AttributeError), sdpa_kernel(getattr(SDPBackend, name)):
            torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
            usable.append(name.removesuffix("_ATTENTION").lower())
    if not usable:
        return "fail", "none", ""
    found = f"scaled_dot_product_attention through {', '.join(usable)}"
    if usable == ["math"]:
        return "warn", found, "memory is quadratic in data.seq_len: shorten it"
    return "ok", found, ""


def compile_() -> Outcome:
    """What train.compile = auto does, and whether torch.compile finds its tools."""
    kind = chosen().type
    tool = next(filter(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++"))), "")
    least = COMPILE_FROM.get(kind)
    when = f"runs of {least:.0e} FLOP and more" if least else f"nothing on {kind}"
    found = f"train.compile = auto: compiles {when}; {tool or 'no C++ compiler'}"
    if kind == "cuda":
        found += f", triton {version('triton')}"
        if version("triton") == "missing" or not shutil.which(os.environ.get("CC", "gcc")):
            return "warn", found, "install triton and gcc, or runs are not compiled"
    elif least and not tool:
        return "warn", found, "install g++, or long runs take longer"
    return "ok", found, ""


def disk() -> Outcome:
    status, fix, frees = "ok", "", []
    for what, path in (("in the cache", cache_directory()), ("here", Path.cwd())):
        path = next(folder for folder in (path, *path.parents) if folder.exists())
        free = shutil.disk_usage(path).free / GB
        frees.append(f"{free:.1f} GB free {what}")
        if not os.access(path, os.W_OK):
            status, fix = "fail", f"{path} is not writable: take another directory"
        elif free < 1 and status == "ok":
            status, fix = "warn", f"make room in {path}"
    return status, f"{', '.join(frees)}; a checkpoint takes about 12 bytes per parameter", fix


def shared_memory() -> Outcome:
    if not os.path.isdir("/dev/shm"):
        return "ok", "no /dev/shm on this system, none needed", ""
    free = shutil.disk_usage("/dev/shm").free / GB
    if free < 0.25 and torch.cuda.device_count() > 1:
        fix = "NCCL passes data between GPUs through it: docker run --shm-size=1g"
        return "warn", f"{free:.2f} GB free in /dev/shm", fix
    return "ok", f"{free:.2f} GB free in /dev/shm", ""


def backends() -> Outcome:
    here = [n for n in ("nccl", "gloo") if getattr(dist, f"is_{n}_available", lambda: False)()]
    found = f"torch.distributed with {', '.join(here) or 'none'}"
    if "gloo" not in here or (torch.cuda.device_count() > 1 and "nccl" not in here):
        return "warn", found, "runs of several processes need another build of torch"
    return "ok", found, ""


HANDSHAKE = """
import os, sys, torch, torch.distributed as dist
from datetime import timedelta
meeting, backend, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
if backend == "nccl": torch.cuda.set_device(device)
dist.init_process_group(backend, init_method="file://" + meeting, rank=rank, world_size=2,
                        timeout=timedelta(seconds=60))
x = torch.full((1000,), float(rank + 1), device=device)
dist.all_reduce(x)
assert bool((x == 3).all()), x
print("agreed", flush=True)
os._exit(0)
"""


def handshake(seconds: float = 90.0) -> Outcome:
    """Let two processes sum a tensor."""
    backend = "nccl" if torch.cuda.device_count() > 1 and dist.is_nccl_available() else "gloo"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", HANDSHAKE, os.path.join(folder, "meeting"), backend]
        processes = [subprocess.Popen([*command, rank], **pipes) for rank in "01"]
        try:
            outputs = [p.communicate(timeout=seconds)[0] for p in processes]
        except subprocess.TimeoutExpired:
            outputs = [f"no answer in {seconds:.0f} s"]
        finally:
            for p in processes:
                p.kill()
                p.wait()
    if [output[:6] for output in outputs] == ["agreed"] * 2:
        return "ok", f"two processes agreed through {backend}", ""
    words = [line for output in outputs for line in output.splitlines() if "agreed" not in line]
    fix = "runs of several processes: see that the host name resolves and no firewall is between"
    return "fail", f"{backend}: {words[-1] if words else 'no output'}", fix

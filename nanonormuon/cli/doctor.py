"""What this machine offers to a run, what a run would choose and why, and what to mend."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from nanonormuon.build import COMPILE_FROM
from nanonormuon.runtime import distributed
from nanonormuon.storage.files import cache_directory

GB = 1 << 30
OPTIONAL = ("transformers", "matplotlib", "tensorboard", "wandb", "pyarrow", "ijson")


@dataclass(frozen=True)
class Finding:
    """status: ok, warn (a run works, but) or fail. fix: what to do about it."""

    check: str
    status: str
    found: str
    fix: str = ""


def examine() -> list[Finding]:
    """All checks, in the order in which a run would meet them."""
    checks: list[Callable[[], Finding]] = [
        python, packages, extras, device, precision, attention, compiler, disk, shared_memory,
        backends, handshake,
    ]  # fmt: skip
    findings = []
    for check in checks:
        name = check.__name__.replace("_", " ")
        try:
            findings.append(check())
        except Exception as error:  # a check that breaks is a finding, too
            findings.append(Finding(name, "fail", f"{type(error).__name__}: {error}"))
    return findings


def describe(findings: list[Finding]) -> str:
    lines = []
    for f in findings:
        lines.append(f"{f.status:<5} {f.check:<14} {f.found}")
        if f.fix:
            lines.append(f"{'':<5} {'':<14} -> {f.fix}")
    return "\n".join(lines)


def python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("python", "ok", found)


def packages() -> Finding:
    names = ("torch", "typer", "tiktoken", "numpy", "safetensors", "tqdm", "rustbpe")
    versions = {name: version(name) for name in names}
    missing = [name for name, v in versions.items() if v is None]
    found = ", ".join(f"{n} {v or 'missing'}" for n, v in versions.items())
    if missing:
        return Finding("packages", "fail", found, f"pip install {' '.join(missing)}")
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 10):
        return Finding("packages", "fail", found, "pip install 'torch>=2.10'")
    return Finding("packages", "ok", found)


def extras() -> Finding:
    found = ", ".join(f"{n} {version(n) or 'not there'}" for n in OPTIONAL)
    return Finding("extras", "ok", f"{found} (only for the commands that ask for them)")


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def device() -> Finding:
    if torch.cuda.is_available():
        gpus = []
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            gpus.append(f"{p.name}, capability {p.major}.{p.minor}, {p.total_memory / GB:.0f} GB")
        free = torch.cuda.mem_get_info()[0]
        found = f"cuda: {'; '.join(gpus)}; {free / GB:.1f} GB free on the first"
        if free < 2 * GB:
            return Finding("device", "warn", found, "another process fills the GPU: nvidia-smi")
        return Finding("device", "ok", found)
    if torch.backends.mps.is_available():
        return Finding("device", "ok", "mps (Apple GPU)")
    found = f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads used by torch"
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists():
        fix = f"an NVIDIA driver is there, torch {torch.__version__} cannot use it: install "
        return Finding("device", "warn", found, fix + "torch's CUDA build for this driver")
    return Finding("device", "ok", found)


def chosen() -> torch.device:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("mps" if kind == "cpu" and torch.backends.mps.is_available() else kind)


def precision() -> Finding:
    dtype = distributed.compute_dtype("auto", chosen())
    why = {
        "cuda": "compute capability 8.0 or higher multiplies bfloat16",
        "cpu": "this CPU multiplies bfloat16 (AVX-512 bf16 or AMX)",
    }.get(chosen().type, "")
    if dtype == torch.float32:
        why = f"no native bfloat16 on this {chosen().type}; train.dtype = bf16 would be slower"
    return Finding("precision", "ok", f"{str(dtype).removeprefix('torch.')}: {why}")


def attention() -> Finding:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    where, usable = chosen(), []
    dtype = distributed.compute_dtype("auto", where)
    q = torch.zeros(1, 2, 64, 64, dtype=dtype, device=where)
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
            usable.append(name.removesuffix("_ATTENTION").lower())
        except (RuntimeError, AttributeError):
            continue
    found = f"scaled_dot_product_attention through {', '.join(usable)}"
    if usable == ["math"]:
        fix = "attention needs memory quadratic in seq_len here: shorter data.seq_len"
        return Finding("attention", "warn", found, fix)
    return Finding("attention", "ok", found) if usable else Finding("attention", "fail", "none")


def compiler() -> Finding:
    """What train.compile = auto does here, and whether it can."""
    tool = next((t for t in (os.environ.get("CXX"), "g++", "clang++") if t and shutil.which(t)), "")
    kind, least = chosen().type, COMPILE_FROM.get(chosen().type)
    when = f"runs of {least:.0e} FLOP and more" if least else f"nothing on {kind}"
    found = f"train.compile = auto: compiles {when}; {tool or 'no C++ compiler'}"
    if kind == "cuda":
        found += f", triton {version('triton') or 'missing'}"
        if not version("triton") or not shutil.which(os.environ.get("CC", "gcc")):
            return Finding("compile", "warn", found, "install triton and gcc, or it runs eagerly")
    elif least and not tool:
        return Finding("compile", "warn", found, "install g++, or long runs take longer")
    return Finding("compile", "ok", found)


def disk() -> Finding:
    places = {}
    for what, path in (("here", Path.cwd()), ("cache", cache_directory())):
        while not path.exists():
            path = path.parent
        places[what] = (path, shutil.disk_usage(path).free / GB, os.access(path, os.W_OK))
    found = ", ".join(f"{free:.1f} GB free {what}" for what, (_, free, _) in places.items())
    for path, free, writable in places.values():
        if not writable:
            return Finding("disk", "fail", f"{found}; {path} is not writable", "change to another")
        if free < 1:
            fix = f"make room in {path}: a checkpoint takes 12 bytes per parameter"
            return Finding("disk", "warn", found, fix)
    return Finding("disk", "ok", f"{found}; a checkpoint takes about 12 bytes per parameter")


def shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("shared memory", "ok", "no /dev/shm on this system, none needed")
    free = shutil.disk_usage(path).free / GB
    if free < 0.25 and torch.cuda.device_count() > 1:
        fix = "NCCL passes data between GPUs through it: docker run --shm-size=1g"
        return Finding("shared memory", "warn", f"{free:.2f} GB free", fix)
    return Finding("shared memory", "ok", f"{free:.2f} GB free in /dev/shm")


def backends() -> Finding:
    here = [n for n in ("nccl", "gloo") if getattr(dist, f"is_{n}_available", lambda: False)()]
    found = f"torch.distributed with {', '.join(here) or 'none'}"
    if "gloo" not in here or (torch.cuda.device_count() > 1 and "nccl" not in here):
        return Finding("backends", "warn", found, "one process works; several need another torch")
    return Finding("backends", "ok", found)


HANDSHAKE = """
import sys
from datetime import timedelta
import torch, torch.distributed as dist
file, rank, backend = sys.argv[1], int(sys.argv[2]), sys.argv[3]
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
if backend == "nccl": torch.cuda.set_device(device)
dist.init_process_group(backend, init_method="file://" + file, rank=rank, world_size=2,
                        timeout=timedelta(seconds=60))
x = torch.full((1000,), float(rank + 1), device=device)
dist.all_reduce(x)
assert bool((x == 3).all()), x
print("agreed", flush=True)
import os; os._exit(0)
"""


def handshake(seconds: float = 90.0) -> Finding:
    """Two processes, one sum."""
    backend = "nccl" if torch.cuda.device_count() > 1 and dist.is_nccl_available() else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, "-c", HANDSHAKE, str(Path(folder, "meeting"))]
        processes = [
            subprocess.Popen(
                [*arguments, str(rank), backend],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in (0, 1)
        ]
        try:
            outputs = [p.communicate(timeout=seconds)[0] for p in processes]
        except subprocess.TimeoutExpired:
            outputs = [f"no answer in {seconds:.0f} s"]
        finally:
            for p in processes:
                p.kill()
                p.wait()
    if all(output.startswith("agreed") for output in outputs) and len(outputs) == 2:
        return Finding("handshake", "ok", f"two processes agreed through {backend}")
    words = [line for output in outputs for line in output.splitlines() if "agreed" not in line]
    fix = (
        "one process works; for several see that the host name resolves and no firewall is between"
    )
    return Finding("handshake", "fail", f"{backend}: {words[-1] if words else 'no output'}", fix)

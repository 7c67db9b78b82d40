"""Other people's optimizers and models, for the --against of bench_optimizer.py and bench_train.py.

torch and pytorch_optimizer are used as installed; dion (github.com/microsoft/dion) and nanogpt
(github.com/karpathy/nanoGPT) from a checkout: dion=../dion, nanogpt=../nanoGPT. None of them is
needed otherwise.
"""

import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

OPTIMIZERS = {
    "torch": ("torch.optim", "Muon"),
    "pytorch_optimizer": ("pytorch_optimizer", "NorMuon"),
    "dion": ("dion.normuon", "NorMuon"),
}


def imported(module: str, checkout: str):
    """A module, from a checkout if one is given. Exits with a message where it is missing."""
    if checkout:
        if not Path(checkout).is_dir():
            sys.exit(f"--against: {checkout}: no such checkout")
        sys.path.insert(0, str(Path(checkout).resolve()))
    try:
        return importlib.import_module(module)
    except ImportError as error:
        sys.exit(f"--against: {module}: {error}; install it, or give a checkout: NAME=DIRECTORY")


def optimizers(against: str) -> dict[str, Callable[[list[nn.Parameter]], Optimizer]]:
    """Label -> maker of an optimizer for matrices, for each name in "torch,dion=DIR,..."."""
    found: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {}
    for name, _, checkout in (part.partition("=") for part in against.split(",") if part):
        if name not in OPTIMIZERS:
            sys.exit(f"--against {name}: expected {', '.join(OPTIMIZERS)}")
        module, attribute = OPTIMIZERS[name]
        make = getattr(imported(module, checkout), attribute)
        label = f"{module.partition('.normuon')[0]}.{attribute}"
        if name == "pytorch_optimizer":  # asks which parameters are matrices
            found[label] = lambda params, make=make: make([{"params": params, "use_muon": True}])
        else:
            found[label] = make
        if name == "dion":  # compiles Newton-Schulz anew for each shape, and stops after eight
            torch._dynamo.config.recompile_limit = 64
    return found


def nanogpt_step(
    checkout: str, layers: int, heads: int, width: int, seq_len: int, vocab_size: int, batch: int
) -> Callable[[], float]:
    """A function that takes one training step of nanoGPT's model and returns its seconds.

    The settings are those of its README's recipe for CPUs: float32, no dropout, no bias, gradients
    clipped at 1, AdamW that is not fused. Random tokens stand for its batches, and its evaluations
    and logging are left out.
    """
    module = imported("model", checkout)
    torch.manual_seed(0)
    config = module.GPTConfig(
        block_size=seq_len, vocab_size=vocab_size, n_layer=layers, n_head=heads, n_embd=width,
        dropout=0.0, bias=False,
    )  # fmt: skip
    model = module.GPT(config)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")

    def step() -> float:
        tokens = torch.randint(vocab_size, (batch, seq_len + 1))
        start = time.perf_counter()
        model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())[1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    return step

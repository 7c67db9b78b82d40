"""torch.compile for an engine's passes and, on a single GPU, NorMuon's step. A compiler that fails
costs a warning."""

import inspect
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanonormuon.errors import out_of_memory
from nanonormuon.normuon import NorMuon
from nanonormuon.runtime import distributed
from nanonormuon.runtime.memory import together

log = logging.getLogger(__name__)
Trial = Callable[[], tuple[Tensor, Tensor]]


def compile_engine(engine: Any, trial: Trial) -> float:
    """Compile an engine.Engine if a trial batch then works on all ranks; returns the seconds."""
    start = time.perf_counter()
    failure = attempt(engine, trial)
    seconds = time.perf_counter() - start
    if failure:
        log.warning(f"torch.compile failed, going on without it: {failure}")
    else:
        log.info(f"compiled in {seconds:.0f} s")
    return seconds


def attempt(engine: Any, trial: Trial) -> str:
    """Compile an engine; returns why it failed, "" if it did not. Leaves no gradients. Raises as
    Engine.accumulate does when out of memory."""
    failures: list[Exception] = []

    def passes() -> None:
        try:  # under FSDP2 torch runs uncompiled what it cannot trace
            with torch._dynamo.config.patch(suppress_errors=engine.sharded):
                fast(*trial()).backward()
        except Exception as error:
            if engine.sharded or out_of_memory(error):  # FSDP2 cannot leave a pass midway
                raise
            failures.append(error)

    fast = torch.compile(engine.replica, backend=tolerant(failures), dynamic=False)
    # zero_grad would not reach a gradient that FSDP2 has not reduced
    engine.sync(engine.sharded)
    together(passes, alone=engine.lockstep)
    engine.zero_grad()
    lines = [f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0]}" for e in failures]
    if distributed.largest([len(lines)])[0]:
        return (*lines, "on another rank")[0]
    engine.forward = fast
    if engine.world.device.type == "cuda" and not engine.dealt and not distributed.grouped():
        for optimizer in engine.optimizers:
            if isinstance(optimizer, NorMuon):
                optimizer.step = compiled_step(optimizer, tolerant([]))
    return ""


def tolerant(failures: list[Exception]) -> Callable[..., Callable]:
    """Make a backend of torch.compile that runs a graph uncompiled if inductor fails, and appends
    the error to `failures`."""

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        try:
            return torch._dynamo.lookup_backend("inductor")(graph, inputs)
        except Exception as error:  # a compiler may raise anything
            if out_of_memory(error):
                raise
            failures.append(error)
            return graph.forward  # other ranks would wait if this one left the pass

    return backend


def compiled_step(optimizer: NorMuon, backend: str | Callable) -> Callable[[], None]:
    """Compile NorMuon's step to one graph: some 60 kernel launches instead of 134."""
    # unwrapped: a graph cannot contain the profiler's hook
    graph = torch.compile(inspect.unwrap(NorMuon.step), backend=backend, dynamic=False)
    groups, scheduled = optimizer.param_groups, ("lr", "momentum")

    @torch.no_grad()
    def step() -> None:
        rates = [{key: group[key] for key in scheduled} for group in groups]
        for group, numbers in zip(groups, rates):  # a graph would keep a number as a constant
            group |= {k: torch.tensor(x, dtype=torch.float64) for k, x in numbers.items()}
        try:
            with torch._dynamo.config.patch(suppress_errors=True):
                graph(optimizer)
        finally:
            for group, numbers in zip(groups, rates):
                group |= numbers

    return step

"""A recipe's training step: tokens per second, utilisation, where the time goes, peak memory.

    python scripts/bench_train.py [RECIPE KEY=VALUE ...] [--steps 20] [--two] [--against PEER]

Prints a table and, last, one JSON line. Utilisation is the model's FLOPs (6 per weight and token,
and attention's products) over the rate of a large product measured in the same run. Memory is
compared with what the process held before, weights, gradients, optimizer and what autograd keeps
(cli/dry_run.py). --two: also two processes with half of the threads each, which need data.path to
exist already. --against nanogpt=CHECKOUT: a step of nanoGPT's model of the recipe's layers, heads,
width, context and batch, in turn with ours (scripts/peers.py).
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peers import nanogpt_step

from nanonormuon.cli import dry_run
from nanonormuon.config import load
from nanonormuon.runtime import distributed, qk_clip
from nanonormuon.runtime.faults import Stopping, Watch
from nanonormuon.storage.run import RunDirectory
from nanonormuon.train import Trainer


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices: 2,048 rows, on a GPU 8,192."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        wait(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[2:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Seconds spent in functions, by name."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}

    def timed(self, name: str, function):
        def call(*args, **kwargs):
            wait(self.device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            wait(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        return call


def iter_of(batches: Iterator, take: Callable) -> Iterator:
    """The batches, each taken through `take`, which measures it."""
    while (batch := take(batches, None)) is not None:
        yield batch


def measure(arguments: list[str], steps: int, checkout: str = "") -> dict:
    """One process's (or rank's) figures; with `checkout` also nanoGPT's."""
    config, _ = load(arguments)
    world = distributed.start(config.train.device)
    before = distributed.peak_memory(world.device) or 0
    with tempfile.TemporaryDirectory() as folder, RunDirectory(Path(folder), world.first) as run:
        trainer = Trainer(config, run, world, Watch(0, Stopping()))
        begin = time.perf_counter()
        trainer.begin()
        compile_seconds = time.perf_counter() - begin
        for _ in range(3):
            trainer.take_step()
        whole, engine, loader = [], trainer.engine, trainer.loader
        dtype = engine.model.compute_dtype
        rate, peer, theirs = product_rate(world.device, dtype), None, []
        if checkout:
            c, seq_len = trainer.config.model, trainer.config.data.seq_len
            batch = config.train.batch_tokens // seq_len
            size = (c.n_layer, c.n_head, c.n_embd, seq_len, c.vocab_size, batch)
            peer = nanogpt_step(checkout, *size)
            peer()
        for _ in range(steps):  # nothing in between waits for the device, as in training
            wait(world.device)
            start = time.perf_counter()
            trainer.take_step()
            wait(world.device)
            whole.append(time.perf_counter() - start)
            if peer:
                theirs.append(peer())
        rate = statistics.mean([rate, product_rate(world.device, dtype)])
        clock = Clock(world.device)
        micro_batches, take = loader.micro_batches, clock.timed("batch", next)
        loader.micro_batches = lambda *which: iter_of(micro_batches(*which), take)
        engine.forward = clock.timed("forward", engine.forward)
        for optimizer in engine.optimizers:
            optimizer.step = clock.timed(type(optimizer).__name__, optimizer.step)
        if trainer.config.optim.qk_clip:  # reads logits in the forward pass, scales after updates
            qk_clip.note = clock.timed("QK-clip, reading", qk_clip.note)
            engine.extras[0].apply = clock.timed("QK-clip, scaling", engine.extras[0].apply)
        original = torch.Tensor.backward
        torch.Tensor.backward = clock.timed("backward", original)
        for _ in range(steps):
            clock.timed("step", trainer.take_step)()
        torch.Tensor.backward = original
    seconds, tokens = statistics.median(whole), config.train.batch_tokens
    shards = distributed.shards(trainer.config.train.parallel)
    made = dry_run.build(trainer.config, torch.device("meta"))
    parts_of = dry_run.memory_parts(trainer.config, *made, trainer.memory.size, world.size, shards)
    needed = sum(parts_of.values())
    parts = {name: 1e3 * s / steps for name, s in clock.seconds.items()}
    # with optim.qk_clip=100 model.qk_norm=false; within the forward pass
    reading = parts.get("QK-clip, reading", 0.0)
    parts["rest"] = 2 * parts["step"] - (sum(parts.values()) - reading)
    clipping = reading + parts.get("QK-clip, scaling", 0.0)
    flops = engine.model.flops_per_token(config.data.seq_len) * tokens / seconds
    peak = distributed.peak_memory(world.device) or 0
    return {
        "micro-batch": trainer.memory.size,
        "ms per step": 1e3 * seconds,
        "tokens per second": tokens / seconds,
        "TFLOP/s": flops / 1e12,
        "TFLOP/s of a large product": rate / 1e12,
        "utilisation": flops / rate / world.size,
        "seconds to set up and compile": compile_seconds,
        "peak memory, GB": peak / 1e9,
        "of which before the model": before / 1e9,
        "and needed after": needed / 1e9,
        "peak / (before + needed)": peak / (before + needed),
        **({"ms per step of nanoGPT": 1e3 * statistics.median(theirs)} if peer else {}),
        **({"ours / nanoGPT's": seconds / statistics.median(theirs)} if peer else {}),
        "percent outside passes and update": 100 * (parts["batch"] + parts["rest"]) / parts["step"],
        **({"percent for QK-clip": 100 * clipping / parts["step"]} if clipping else {}),
        **{f"ms {name}": value for name, value in parts.items() if name != "step"},
    }


def rank(number: int, ranks: int, port: int, arguments: list[str], steps: int, queue) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(ranks))
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    found = measure(arguments, steps)
    if not number:
        queue.put(found)
    distributed.finish()


def start_ranks(ranks: int, arguments: list[str], steps: int) -> dict:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=rank, args=(r, ranks, port, arguments, steps, queue), daemon=True)
        for r in range(ranks)
    ]
    for process in processes:
        process.start()
    return queue.get(timeout=900)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("arguments", nargs="*", metavar="RECIPE|KEY=VALUE", help="default: demo")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--two", action="store_true", help="also on two processes")
    parser.add_argument("--against", default="", metavar="nanogpt=DIR", help="also time nanoGPT")
    options = parser.parse_args()
    if options.against and not options.against.startswith("nanogpt="):
        parser.error(f"--against {options.against}: expected nanogpt=DIRECTORY")
    checkout = options.against.partition("=")[2]
    arguments = [*(options.arguments or ["demo"]), "train.sample_tokens=0"]
    result = {"arguments": arguments, "torch": torch.__version__}
    result["one process"] = measure(arguments, options.steps, checkout)
    if options.two:
        result["two processes"] = start_ranks(2, arguments, options.steps)
        result["two / one"] = (
            result["two processes"]["tokens per second"]
            / result["one process"]["tokens per second"]
        )
    for title in ("one process", "two processes"):
        if title in result:
            print(f"{title}: {' '.join(arguments)}")
            for name, value in result[title].items():
                print(f"  {name:<32} {value:>12,.3f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

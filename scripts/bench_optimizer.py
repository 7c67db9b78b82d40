"""The optimizer step alone: NorMuon, its peers and fused AdamW, on one process and on two.

    python scripts/bench_optimizer.py [--steps 7] [--device cuda] [--against PEER,...]

A peer is torch (its Muon, the default), pytorch_optimizer (its NorMuon, if it is installed) or
dion=CHECKOUT (its NorMuon): scripts/peers.py.

Prints a table and, last, one JSON line. Optimizers take turns within one run, and medians are
compared, because machines drift: only the ratios mean anything. It also prints NorMuon's share of a
training step, and on two processes the bytes that a rank sends, against the formula in
`expected_bytes`.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import time
from dataclasses import replace

import torch
import torch.distributed as dist
from peers import optimizers as peers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from nanonormuon import NorMuon
from nanonormuon.config import load
from nanonormuon.model import GPT
from nanonormuon.optim import make_optimizers
from nanonormuon.runtime.distributed import compute_dtype, keep_freed_memory

SIZES = {
    "width 768, 4 layers": (768, 4),
    "width 256, 6 layers": (256, 6),
    "width 128, 5 layers": (128, 5),
}


def shapes(width: int, layers: int) -> list[tuple[int, int]]:
    """q, k, v, o and a plain MLP of four times the width, per layer."""
    layer = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    return layer * layers


def parameters(width: int, layers: int, mesh=None, device: str = "cpu") -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    params = []
    for shape in shapes(width, layers):
        W, G = torch.randn(shape).to(device), torch.randn(shape).to(device)
        if mesh is not None:
            W, G = (distribute_tensor(t, mesh, [Shard(0)]) for t in (W, G))
        params.append(torch.nn.Parameter(W))
        params[-1].grad = G
    return params


def wait() -> None:
    """Until a GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(optimizers: dict[str, torch.optim.Optimizer], steps: int) -> dict[str, float]:
    """Median milliseconds of each optimizer's step, after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(steps + 1):
        for name, optimizer in optimizers.items():
            if dist.is_initialized():
                dist.barrier()
            wait()
            start = time.perf_counter()
            optimizer.step()
            wait()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of state per parameter."""
    state = [t for s in optimizer.state.values() for t in s.values()]
    count = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    return sum(t.numel() * t.element_size() for t in state) / count


def expected_bytes(width: int, layers: int, ranks: int) -> float:
    """What a rank sends in the two all-to-alls: 2 + 2 bytes of bf16 for its share of every matrix,
    but for what it keeps; FSDP itself sends 12 bytes per parameter in float32 (two gathers of the
    weights, one reduction of the gradients), so this is a third more."""
    count = sum(m * n for m, n in shapes(width, layers))
    return 4 * count / ranks * (ranks - 1) / ranks


def one_process(steps: int, device: str, against: str) -> dict:
    makers = {"NorMuon": NorMuon, **peers(against)}
    makers["fused AdamW"] = lambda params: torch.optim.AdamW(params, fused=True)
    found = {}
    for label, size in SIZES.items():
        optimizers = {name: make(parameters(*size, device=device)) for name, make in makers.items()}
        row = in_turns(optimizers, steps)
        row |= {f"NorMuon / {name}": row["NorMuon"] / row[name] for name in list(row)[1:-1]}
        row["state bytes per parameter"] = state_bytes(optimizers["NorMuon"])
        found[label] = row
    return found


def share_of_a_step(steps: int, device: str) -> dict:
    """NorMuon's part of a step: forward and backward of one micro-batch are timed, and a step of
    more tokens is that many micro-batches and one update."""
    found = {}
    for recipe, vocab_size, sequences in (("demo", 2048, 16), ("gpt2-124m", 50_304, 1)):
        settings, _ = load([recipe])
        seq_len, batch_tokens = settings.data.seq_len, settings.train.batch_tokens
        label = f"{recipe}, {batch_tokens:,} tokens a step"
        config = replace(settings.model, vocab_size=vocab_size)
        model = GPT(config, compute_dtype("auto", torch.device(device))).init_weights(0).to(device)
        normuon = make_optimizers(model, settings.optim)[0]
        tokens = torch.randint(config.vocab_size, (sequences, seq_len + 1), device=device)
        passes, updates = [], []
        for _ in range(steps // 2 + 2):
            wait()
            start = time.perf_counter()
            model(tokens[:, :-1], tokens[:, 1:]).backward()
            wait()
            middle = time.perf_counter()
            normuon.step()
            wait()
            passes.append(middle - start)
            updates.append(time.perf_counter() - middle)
            model.zero_grad()
        one_pass, update = statistics.median(passes[1:]), statistics.median(updates[1:])
        whole = one_pass * batch_tokens / (sequences * seq_len) + update
        found[label] = {
            "ms forward and backward, 1,024 tokens": 1e6 * one_pass / (sequences * seq_len) * 1.024,
            "ms NorMuon": 1e3 * update,
            "percent of the step": 100 * update / whole,
        }
    return found


def several_processes(rank: int, ranks: int, port: int, steps: int, queue) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks)
    )
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group("gloo")
    mesh, found = init_device_mesh("cpu", (ranks,)), {}
    for label, size in SIZES.items():
        sharded = NorMuon(parameters(*size, mesh))
        row = in_turns({"DDP": NorMuon(parameters(*size)), "FSDP2": sharded}, steps)
        sent, original = [0], dist.all_to_all_single

        def counted(out, data, received, sizes, *args, _to=original, _sent=sent, **kwargs):
            _sent[0] += data.element_size() * (sum(sizes) - sizes[rank])
            return _to(out, data, received, sizes, *args, **kwargs)

        dist.all_to_all_single = counted
        sharded.step()
        dist.all_to_all_single = original
        row["bytes sent by rank 0"] = sent[0]
        row["bytes expected"] = expected_bytes(*size, ranks)
        row["beside FSDP in float32"] = sent[0] / (3 * expected_bytes(*size, ranks))
        found[label] = row
    if rank == 0:
        queue.put(found)
    dist.destroy_process_group()


def start_processes(ranks: int, steps: int) -> dict:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = [(rank, ranks, port, steps, queue) for rank in range(ranks)]
    processes = [context.Process(target=several_processes, args=a) for a in arguments]
    for process in processes:
        process.start()
    found = queue.get(timeout=600)
    for process in processes:
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=7, help="counted steps of each")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; two processes: cpu only")
    parser.add_argument("--against", default="torch", help="peers, see above [%(default)s]")
    parser.add_argument("--small", action="store_true", help="one tiny size, to try the script")
    steps, device, against, small = vars(parser.parse_args()).values()
    if small:
        SIZES.clear()
        SIZES["width 64, 1 layer"] = 64, 1
    result = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device}
    keep_freed_memory()  # as training has it
    result["one process"] = one_process(steps, device, against)
    result["in training"] = {} if small else share_of_a_step(steps, device)
    two = device == "cpu" and not small
    result["two processes"] = start_processes(2, steps) if two else {}
    for kind in ("one process", "in training", "two processes"):
        for label, row in result[kind].items():
            print(f"{kind}: {label}")
            for name, value in row.items():
                print(f"  {name:<42} {value:>14,.3f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

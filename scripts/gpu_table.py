"""What a training step should take on H100 GPUs, on paper: docs/gpu.md, from the program's counts.

    python scripts/gpu_table.py > docs/gpu.md

Parameters, FLOPs and memory are cli/dry_run.py's. One micro-batch and one NorMuon step run on meta
tensors, which have shapes alone, while products, bytes and kernels are counted.
"""

from collections import Counter
from math import ceil

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nanonormuon import NorMuon
from nanonormuon import model as model_module
from nanonormuon.cli import dry_run
from nanonormuon.config import load
from nanonormuon.model import GPT
from nanonormuon.optim import make_optimizers
from nanonormuon.runtime import activations
from nanonormuon.runtime.memory import divisors

RECIPES = ("gpt2-124m", "gpt2-350m", "paper-1.1b", "track3-normuon")
PEAK, HBM, NVLINK, ROOM = 989e12, 3.35e12, 450e9, 72e9  # FLOP/s in bf16, bytes/s, bytes
PRODUCTS, TRAFFIC = 0.65, 0.8  # shares of these rates that are assumed to be reached
FUSED = 0.35  # of the bytes of eager operations without products, what a compiler leaves
LAUNCH = 4e-6  # seconds from launch to launch of an optimizer's small kernels
PEAKS = f"{PRODUCTS:.0%} of {PEAK / 1e12:.0f} TFLOP/s (bf16)"
MEMORY = f"{TRAFFIC:.0%} of {HBM / 1e12:.2f} TB/s"
LINKS = f"{TRAFFIC:.0%} of {NVLINK / 1e9:.0f} GB/s each way"
NOTES = f"""# A training step on H100 GPUs, on paper

For anyone who plans a run on GPUs or measures one. This page answers how long a step should take,
what fills it, and how much memory it holds. Nothing here is measured:
`python scripts/gpu_table.py > docs/gpu.md` computes it from the program's own counts.

Times are in ms, per rank and step. Assumed are

* products at {PEAKS},
* memory at {MEMORY},
* links at {LINKS},
* a compiler that leaves {FUSED:.0%} of the bytes that eager operations other than products move.

"sent" overlaps nothing, though most of it can. MFU is the model's FLOPs over peak and expected
time, without and with "sent". The micro-batch is the largest below {ROOM / 1e9:.0f} GB by the
estimate of `--dry-run`. Kernels are eager operations that are no views. Collectives are per step,
without the one that checks it.

To measure: `scripts/gpu_check.sh OUT` writes `OUT/table.txt`, whose figures belong in the last
column.
"""


class Traffic(TorchDispatchMode):
    """Counts kernels, and the bytes that they read and write: of products, and of all others."""

    def __init__(self):
        super().__init__()
        self.kernels, self.bytes = 0, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.is_view or "empty" in str(function) or "detach" in str(function):
            return result
        trees = torch.utils._pytree.tree_leaves((args, kwargs, result))
        moved = sum(t.numel() * t.element_size() for t in trees if isinstance(t, torch.Tensor))
        product = any(word in str(function) for word in ("mm", "attention", "linear"))
        self.bytes["products" if product else "others"] += moved
        self.kernels += 1
        return result


def counted(work) -> tuple[float, float, Traffic]:
    """FLOPs of products, seconds, and traffic of `work` on meta tensors, once compiled."""
    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        work()
    moved = traffic.bytes["products"] + FUSED * traffic.bytes["others"]
    seconds = max(flops.get_total_flops() / PEAK / PRODUCTS, moved / HBM / TRAFFIC)
    return flops.get_total_flops(), seconds, traffic


def flash(q, k, v, scale, _mask):
    """The kernel that a GPU takes; meta tensors would take the one that keeps all scores."""
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)[0]


def row(recipe: str, ranks: int) -> list[str]:
    config = load([recipe])[0]
    T, sharded = config.data.seq_len, ranks > 1 and config.train.parallel == "fsdp"
    per_rank = config.train.batch_tokens // T // ranks
    fits = [n for n in divisors(per_rank) if n * T <= 1 << 17]
    whole, shards = dry_run.build(config, torch.device("meta")), ranks if sharded else 1
    bytes_of = {
        n: sum(dry_run.memory_parts(config, *whole, n, ranks, shards).values()) for n in fits
    }
    micro = max((n for n, size in bytes_of.items() if size < ROOM), default=1)
    count = per_rank // micro
    with torch.device("meta"):
        model = GPT(config.model, torch.bfloat16)
        tokens = torch.zeros(micro, T, dtype=torch.int64)
    optimizers = make_optimizers(model, config.optim, torch.bfloat16)
    muon = next(o for o in optimizers if isinstance(o, NorMuon))

    _, pass_seconds, passes = counted(lambda: model(tokens, tokens).backward())
    ns_flops, ns_seconds, steps = counted(muon.step)
    parameters = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for g in muon.param_groups for p in g["params"])
    others, held = parameters - matrices, parameters // (ranks if sharded else 1)
    ns_seconds = ns_seconds / ranks + LAUNCH * steps.kernels
    adam_seconds = 28 * others / (ranks if sharded else 1) / HBM / TRAFFIC  # 7 float32 per weight
    norms_seconds = (4 + 4 + 4 + 4 * others / parameters) * held / HBM / TRAFFIC
    away, buckets, blocks = (ranks - 1) / ranks, len(muon.buckets), config.model.n_layer + 1
    if ranks == 1:
        sent, collectives = 0.0, "none"
    elif sharded:  # weights twice per micro-batch, gradients once, in and out of Newton-Schulz
        sent = away * (2 * count * 2 * parameters + 4 * parameters + 2 * 2 * matrices / ranks)
        collectives = f"{2 * count * blocks} gathers, {blocks} reductions, {3 * buckets} NorMuon"
    else:
        sent = away * (2 * 4 * parameters + 2 * matrices)
        collectives = f"{ceil(4 * parameters / 26e6)} reductions, {buckets} NorMuon"
    computing = count * pass_seconds + ns_seconds + adam_seconds + norms_seconds
    sending = sent / NVLINK / TRAFFIC
    flops = model.flops_per_token(T) * config.train.batch_tokens / ranks
    mfu = [flops / PEAK / seconds for seconds in (computing, computing + sending)]
    ms = [1e3 * s for s in (count * pass_seconds, ns_seconds, adam_seconds, norms_seconds, sending)]
    return [
        recipe, str(ranks), f"{micro} x {count}", f"{flops / 1e12:.0f}", f"{ns_flops / 1e12:.2f}",
        f"{count * sum(passes.bytes.values()) / 1e9:,.0f}", f"{count * passes.kernels:,}",
        f"{steps.kernels:,}", collectives, *(f"{x:,.1f}" for x in ms),
        f"{1e3 * (computing + sending):,.0f}",
        f"{100 * mfu[0]:.0f}, {100 * mfu[1]:.0f}", f"{bytes_of[micro] / 1e9:.0f}", "",
    ]  # fmt: skip


def main() -> None:
    model_module.attend = flash
    activations.here = dry_run.here = lambda: torch.device("cpu")
    heads = ["recipe", "ranks", "micro-batch x count", "TFLOP", "TFLOP NorMuon", "GB moved, eager",
             "kernels, passes", "kernels, NorMuon", "collectives", "passes", "NorMuon", "AdamW",
             "norms", "sent", "ms in all", "MFU %", "GB held",
             "measured: ms, MFU %, GB"]  # fmt: skip
    print(NOTES)
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for recipe in RECIPES:
        for ranks in (1, 8):
            print(f"| {' | '.join(row(recipe, ranks))} |", flush=True)


if __name__ == "__main__":
    main()

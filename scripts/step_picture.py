"""What a training step consists of at widths 128, 256 and 768: one picture, for docs/results.

    python scripts/step_picture.py [--out docs/results/step.png] [--widths 128,256,768] [--steps 15]

Each model has four layers, heads of 64 channels, a vocabulary of 2,048 and 16 x 256 tokens a step.
Passes and NorMuon's step are timed without the profiler (lower quartiles, since other work only
adds), then profiled by operator and scaled to that time where the profiler made them slower; what
the operators do not account for (Python, autograd, dispatch) is "calls". The line marks the time of
the model's products alone at the rate of a large product, the highest measured in this run. Prints
one JSON line. Only figures of an otherwise idle machine mean anything.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from bench_train import product_rate
from torch.profiler import ProfilerActivity, profile

from nanonormuon.config import OptimConfig
from nanonormuon.model import GPT
from nanonormuon.optim import make_optimizers
from nanonormuon.parts.config import GPTConfig
from nanonormuon.runs.pictures import picture
from nanonormuon.runtime.distributed import compute_dtype, keep_freed_memory

KINDS = {  # operators by what they do
    "products": ("mm", "bmm", "addmm", "baddbmm", "addmv_", "mv"),
    "softmax and SiLU": ("_softmax", "_softmax_backward_data", "silu", "silu_backward", "log"),
    "norms and sums": ("linalg_vector_norm", "sum", "rsqrt", "pow", "mean"),
    "copies and casts": ("copy_", "cat", "fill_", "zero_", "roll", "index_select", "gather",
                         "scatter_", "embedding_dense_backward", "triu"),
    "other elementwise": ("mul", "mul_", "add", "add_", "addcmul", "addcmul_", "div", "sub_",
                          "lerp_", "sqrt", "reciprocal", "clamp_min", "where", "eq", "sub"),
}  # fmt: skip


def by_kind(call, steps: int, whole: float) -> dict[str, float]:
    """Milliseconds per call of `call`, which takes `whole`, in each kind of operator."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            call()
    own = {e.key.removeprefix("aten::"): e.self_cpu_time_total for e in found.key_averages()}
    ms = {kind: sum(own.get(k, 0) for k in keys) / 1e3 / steps for kind, keys in KINDS.items()}
    scale = min(1, whole / sum(ms.values()))
    return {kind: scale * value for kind, value in ms.items()}


def duration(call, steps: int) -> float:
    """Milliseconds of a call: the lower quartile of `steps`."""
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.quantiles(times[2:])[0]


def measure(width: int, steps: int) -> dict:
    """A step's milliseconds by kind, its products' FLOP and the rate of a large product."""
    dtype = compute_dtype("auto", torch.device("cpu"))
    config = GPTConfig(vocab_size=2048, n_layer=4, n_head=width // 64, n_embd=width)
    model = GPT(config, dtype).init_weights(0)
    normuon, adamw = make_optimizers(model, OptimConfig(), dtype)
    tokens = torch.randint(2048, (16, 257))

    def passes() -> None:
        model.zero_grad()
        model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).backward()

    passes()
    rate = product_rate(torch.device("cpu"), dtype)
    whole, update = duration(passes, steps), duration(normuon.step, steps)
    parts = by_kind(passes, steps, whole)
    parts["calls"] = whole - sum(parts.values())
    iterating = by_kind(normuon.step, steps, update)["products"]
    parts |= {"NorMuon's products": iterating, "NorMuon's rest": update - iterating}
    parts["AdamW"] = duration(adamw.step, steps)
    return {"width": width, "ms": parts, "FLOP": model.flops_per_token(256) * 4096, "FLOP/s": rate}


def draw(rows: list[dict], out: Path) -> None:
    """A bar per width, in percent of its step."""
    rate = max(row["FLOP/s"] for row in rows)
    with picture(out, 1, 1, 9, 1.5 + 0.7 * len(rows)) as axes:
        axis = axes[0, 0]
        for y, row in enumerate(rows):
            whole, left = sum(row["ms"].values()), 0.0
            for i, (kind, ms) in enumerate(row["ms"].items()):
                share, label = 100 * ms / whole, None if y else kind
                axis.barh(y, share, left=left, color=f"C{i}", label=label)
                if share > 4:
                    axis.text(left + share / 2, y, f"{share:.0f}", ha="center", va="center")
                left += share
            floor = 100 * 1e3 * row["FLOP"] / rate / whole
            axis.plot([floor, floor], [y - 0.42, y + 0.42], color="black", linestyle="-")
        labels = [f"width {r['width']}\n{sum(r['ms'].values()):,.0f} ms" for r in rows]
        axis.set_yticks(range(len(rows)), labels)
        axis.set(xlabel="percent of a step", xlim=(0, 135), ylim=(len(rows) - 0.4, -0.6))
        axis.set_xticks(range(0, 101, 20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results/step.png"))
    parser.add_argument("--widths", default="128,256,768", help="comma-separated multiples of 64")
    parser.add_argument("--steps", type=int, default=15, help="timed and profiled steps of each")
    options = parser.parse_args()
    keep_freed_memory()  # as training has it
    rows = [measure(int(width), options.steps) for width in options.widths.split(",")]
    draw(rows, options.out)
    print(
        json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows})
    )


if __name__ == "__main__":
    main()

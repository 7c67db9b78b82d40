"""Which optimizer for weights that AdamW, or NorMuon, trained? The table in docs/results.md.

    OMP_NUM_THREADS=1 python scripts/finetune_experiment.py --old wikitext.txt --new shakespeare.txt

Small models learn the old text with either optimizer and then, by the recipe `finetune`, the new
one with either. Rates: of the first, by its training loss; of the second, by the loss on a part of
the new text that is neither trained on nor reported. Seed s covers both runs. What is reported is
the best checkpoint (by that same tuning part) on the rest of the new text, and on the old text's
validation split. Finished runs in --work are not repeated.
"""

import argparse
import json
import statistics
from pathlib import Path

from nanonormuon.config import load
from nanonormuon.pretrained.judge import evaluate
from nanonormuon.runs.compare import read
from nanonormuon.text.prepare import prepare
from nanonormuon.train import train

SEEDS = (0, 1, 2)
PRETRAIN = {"adamw": (0.003, 0.01, 0.03), "normuon": (0.01, 0.02, 0.04)}
FINETUNE = {"adamw": (0.003, 0.01, 0.03), "normuon": (0.01, 0.03, 0.1)}
MODEL = ("demo", "model.n_layer=3", "model.n_embd=96", "data.seq_len=128", "train.sample_tokens=0")
FIRST = (*MODEL, "train.steps=640", "train.batch_tokens=1024", "train.eval_every=0")
SECOND = ("finetune", "data.seq_len=128", "train.batch_tokens=1024", "train.steps=240",
          "train.sample_tokens=0", "data.val_tokens=16384")  # fmt: skip


def run(out: Path, *settings: str) -> Path:
    if not (out / "summary.json").exists():
        train(load(settings)[0], out)
    return out


def last_losses(out: Path) -> float:
    """The training loss over the last tenth of the steps."""
    steps, losses = read(out).curve("loss")
    return statistics.mean(x for s, x in zip(steps, losses) if s > 0.9 * steps[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", type=Path, required=True)
    parser.add_argument("--new", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/finetune"))
    arguments = parser.parse_args()
    work, new = arguments.work, arguments.new.read_bytes()
    work.mkdir(parents=True, exist_ok=True)
    tail = len(new) * 9 // 10
    (work / "new.txt").write_bytes(new[:tail])
    (work / "report.txt").write_bytes(new[tail:])
    prepare([arguments.old], work / "old", "bpe:1024", 0.1)
    prepare([work / "new.txt"], work / "new", work / "old" / "tokenizer.json", 1 / 9)

    def first(name: str, lr: float, seed: int) -> Path:
        settings = (f"data.path={work / 'old'}", f"optim.name={name}", f"optim.lr={lr}")
        return run(work / f"{name}-{lr}-{seed}", *FIRST, *settings, f"train.seed={seed}")

    def second(start: Path, name: str, lr: float, seed: int) -> dict:
        settings = (f"data.path={work / 'new'}", f"optim.name={name}", f"optim.lr={lr}")
        out = run(work / f"{start.name}-{name}-{lr}-{seed}", *SECOND, *settings,
                  f"train.init_from={start}", f"train.seed={seed}")  # fmt: skip
        return {"out": out, **json.loads((out / "summary.json").read_text())}

    def losses(path: Path) -> tuple[float, float]:
        found = evaluate(path, data=[work / "old"], texts=[work / "report.txt"])
        return found[1]["loss"], found[0]["loss"]

    rows = []
    for before, rates in PRETRAIN.items():
        swept = {lr: last_losses(first(before, lr, 0)) for lr in rates}
        height = min(swept, key=swept.__getitem__)
        starts = [first(before, height, seed) for seed in SEEDS]
        rows.append((before, f"{height:g}", "-", "-", [losses(start) for start in starts], swept))
        for after, more in FINETUNE.items():
            tuned = {lr: second(starts[0], after, lr, 0)["best_val_loss"] for lr in more}
            lr = min(tuned, key=tuned.__getitem__)
            ends = [second(start, after, lr, seed) for seed, start in zip(SEEDS, starts)]
            found = [losses(end["out"] / end["best_checkpoint"]) for end in ends]
            rows.append((before, f"{height:g}", after, f"{lr:g}", found, tuned))
    print("| trained by | lr | then by | lr | n | new text | old text | swept: rate, loss |")
    print("|---|---|---|---|---|---|---|---|")
    for *names, found, swept in rows:
        columns = [f"{statistics.mean(x):.4f} ± {statistics.stdev(x):.4f}" for x in zip(*found)]
        tried = ", ".join(f"{lr:g} {loss:.4f}" for lr, loss in swept.items())
        print("| " + " | ".join([*names, str(len(found)), *columns, tried]) + " |")


if __name__ == "__main__":
    main()

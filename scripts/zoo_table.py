"""The zoo's page from its races' results, so that no figure is typed: tables, plots, state, time.

    python scripts/zoo_table.py runs/zoo                  # after the race of characters
    python scripts/zoo_table.py runs/zoo-python --text python

Writes TEXT.json and TEXT.png into docs/results/zoo, and the table below the heading of that text
into its README.md. The times are of the update alone, in turn, so only an otherwise idle machine
gives true ones.
"""

import argparse
import json
import re
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from evidence import draw_variants

from nanonormuon.config import load
from nanonormuon.lab.results import as_markdown, ranged, with_spread
from nanonormuon.model import GPT
from nanonormuon.optim import HIDDEN, make_optimizers

TARGET = Path(__file__).parents[1] / "docs" / "results" / "zoo"
HEADINGS = {"characters": "## Characters", "python": "## Python sources"}
STEPS = 21  # of each optimizer, the first five not counted


class Timed:
    """The optimizers of a run with its model's parameters and gradients of noise."""

    def __init__(self, arguments: list[str]):
        config = load(arguments)[0]
        torch.manual_seed(0)
        self.model = GPT(replace(config.model, vocab_size=320))
        self.optimizers = make_optimizers(self.model, config.optim)
        for p in self.model.parameters():
            p.grad = torch.randn_like(p) / p.numel() ** 0.5
        self.seconds = []

    def step(self) -> None:
        start = time.perf_counter()
        for optimizer in self.optimizers:
            optimizer.step()
        self.seconds.append(time.perf_counter() - start)

    @property
    def milliseconds(self) -> float:
        return 1e3 * statistics.median(self.seconds[5:])

    @property
    def state_bytes(self) -> float:
        """Bytes of state per weight of the hidden matrices."""
        held = matrices = 0
        for optimizer in self.optimizers:
            groups = (g for g in optimizer.param_groups if g["role"] in HIDDEN)
            for p in (p for g in groups for p in g["params"]):
                matrices += p.numel()
                tensors = [t for t in optimizer.state[p].values() if torch.is_tensor(t) and t.dim()]
                held += sum(t.numel() * t.element_size() for t in tensors)
        return held / matrices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="OUT of the race")
    parser.add_argument("--text", choices=HEADINGS, default="characters")
    options = parser.parse_args()
    results = json.loads((options.folder / "results.json").read_text())
    recipe, *settings = (a for a in results["arguments"] if not a.startswith("data.path"))
    results |= {"arguments": [recipe, *settings], "command": None}
    ranked = sorted(results["optimizers"], key=lambda r: r["mean"])
    timed = {r["optimizer"]: Timed([recipe, *settings, *r["settings"]]) for r in ranked}
    for _ in range(STEPS):
        for optimizers in timed.values():
            optimizers.step()
    rows = [["optimizer", "lr", "val_loss", "n", "minus Muon (95 %)", "minus NorMuon (95 %)",
             "state, bytes per weight", "update, ms"]]  # fmt: skip
    for r in ranked:
        r["state_bytes_per_weight"] = timed[r["optimizer"]].state_bytes
        r["update_ms"] = timed[r["optimizer"]].milliseconds
        beside = [r["against"].get(other) for other in ("muon", "normuon")]
        cells = [
            "0" if v is None else ranged(v["difference"], "+.4f", between=v["difference_interval"])
            for v in beside
        ]
        figures = [f"{r['state_bytes_per_weight']:.3g}", f"{r['update_ms']:.1f}"]
        loss = with_spread(r["val_loss"])
        rows.append([r["optimizer"], f"{r['lr']:g}", loss, str(r["n"]), *cells, *figures])
    TARGET.mkdir(parents=True, exist_ok=True)
    (TARGET / f"{options.text}.json").write_text(json.dumps(results, indent=1) + "\n")
    others = [r for r in ranked if r["optimizer"] != "normuon"]
    first = [r for r in ranked if r["optimizer"] == "normuon"]
    draw_variants({"optimizers": first + others}, TARGET / f"{options.text}.png")
    page = TARGET / "README.md"
    before, heading, text = page.read_text().partition(HEADINGS[options.text])
    text = re.sub(r"\| optimizer .*?\n(?!\|)", lambda _: as_markdown(rows) + "\n", text, count=1,
                  flags=re.S)  # fmt: skip
    page.write_text(before + heading + text)
    print(as_markdown(rows))


if __name__ == "__main__":
    main()

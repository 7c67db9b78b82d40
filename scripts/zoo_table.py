"""The zoo's page from a race's results, so that no figure is typed: table, plot, bytes of state.

    python scripts/zoo_table.py runs/zoo         # after the race in docs/results/zoo/README.md

Writes race.json and race.png into docs/results/zoo, and the table into its README.md.
"""

import argparse
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

from nanonormuon.config import load
from nanonormuon.lab.results import as_markdown, ranged, with_spread
from nanonormuon.model import GPT
from nanonormuon.optim import HIDDEN, make_optimizers

TARGET = Path(__file__).parents[1] / "docs" / "results" / "zoo"


def state_bytes(arguments: list[str]) -> float:
    """Bytes of an optimizer's state per weight of the hidden matrices."""
    config = load(arguments)[0]
    optimizers = make_optimizers(GPT(replace(config.model, vocab_size=320)), config.optim)
    held = matrices = 0
    for optimizer in optimizers:
        for p in (p for g in optimizer.param_groups if g["role"] in HIDDEN for p in g["params"]):
            matrices += p.numel()
            tensors = optimizer.state[p].values() or [p, p]  # AdamW's two come with its first step
            held += sum(t.numel() * t.element_size() for t in tensors)
    return held / matrices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="OUT of the race")
    folder = parser.parse_args().folder
    results = json.loads((folder / "results.json").read_text())
    recipe, *settings = (a for a in results["arguments"] if not a.startswith("data.path"))
    results |= {"arguments": [recipe, *settings], "command": None}
    rows = [["optimizer", "lr", "val_loss", "n", "minus Muon (95 %)", "minus NorMuon (95 %)",
             "state, bytes per weight"]]  # fmt: skip
    for r in sorted(results["optimizers"], key=lambda r: r["mean"]):
        r["state_bytes_per_weight"] = state_bytes([recipe, *r["settings"]])
        beside = [r["against"].get(other) for other in ("muon", "normuon")]
        cells = [
            "0" if v is None else ranged(v["difference"], "+.4f", between=v["difference_interval"])
            for v in beside
        ]
        rows.append([r["optimizer"], f"{r['lr']:g}", with_spread(r["val_loss"]), str(r["n"]),
                     *cells, f"{r['state_bytes_per_weight']:.3g}"])  # fmt: skip
    TARGET.mkdir(parents=True, exist_ok=True)
    (TARGET / "race.json").write_text(json.dumps(results, indent=1) + "\n")
    shutil.copy(folder / "race.png", TARGET)
    page, table = TARGET / "README.md", as_markdown(rows)
    text = re.sub(r"\| optimizer .*?\n(?!\|)", lambda _: table + "\n", page.read_text(), flags=re.S)
    page.write_text(text)
    print(table)


if __name__ == "__main__":
    main()

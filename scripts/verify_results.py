"""Repeat some runs of docs/results.md and compare their losses with those kept there.

    python scripts/verify_results.py                     # one run of each race that is kept
    python scripts/verify_results.py race-shakespeare --seeds 2

The first optimizer of each race runs again with its chosen settings and the seeds kept. A loss
agrees if it is within three standard deviations (of the kept runs) of the kept loss with its seed;
on the same machine and source the two are equal. Exits with 1 if a loss does not agree.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from nanonormuon.lab.processes import Job, Runner

KEPT = Path(__file__).parents[1] / "docs" / "results"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("races", nargs="*", help="names of files in docs/results; all if none")
    parser.add_argument("--seeds", type=int, default=1, help="runs per race")
    parser.add_argument("--set", action="append", default=[], help="a setting, as data.path=DIR")
    options = parser.parse_args()
    known = {p.stem: p for p in sorted(KEPT.glob("*.json"))}
    if missing := set(options.races) - known.keys():
        parser.error(f"{', '.join(sorted(missing))}: expected some of {', '.join(known)}")
    failed = 0
    print("| race | optimizer | seed | kept | now | allowed | |\n|---|---|---|---|---|---|---|")
    for name in options.races or known:
        found = json.loads(known[name].read_text(encoding="utf-8"))
        entry = found["optimizers"][0]
        if not entry.get("sd"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            settings = [*found["arguments"], *entry["settings"], f"optim.lr={entry['lr']}"]
            settings += ["train.sample_tokens=0", *options.set]
            jobs = [
                Job(Path(folder, str(seed)), (*settings, f"train.seed={seed}"))
                for seed in range(min(options.seeds, entry["n"]))
            ]
            results = Runner().run(jobs)
        for seed, result in enumerate(results):
            kept, now, allowed = entry["val_loss"][seed], result["val_loss"], 3 * entry["sd"]
            agrees = abs(now - kept) <= allowed
            failed += not agrees
            word = "agrees" if agrees else "DIFFERS"
            print(f"| {name} | {entry['optimizer']} | {seed} | {kept:.4f} | {now:.4f} "
                  f"| {allowed:.4f} | {word} |")  # fmt: skip
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())

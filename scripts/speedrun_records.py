"""Write measured records into a track's file, its page and docs/results; no figure is typed.

    normuon-train speedrun shakespeare all --out runs/records     # on an idle machine
    python scripts/speedrun_records.py runs/records/shakespeare [--times runs/times/shakespeare]

A record is taken if it is valid. --times: take the times from other runs of the records, where the
losses were measured beside other work; --no-time: leave them out.
"""

import argparse
import json
import re
from pathlib import Path

from nanonormuon.lab import speedrun

ROOT = Path(__file__).parents[1]
KEPT = ("n", "mean", "sd", "p_value", "time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="OUT/TRACK of normuon-train speedrun")
    parser.add_argument("--no-time", action="store_true", help="leave out the times")
    parser.add_argument("--times", type=Path, help="such a folder, measured on an idle machine")
    options = parser.parse_args()
    name = options.folder.name
    file, page = speedrun.tracks()[name], ROOT / "docs" / "speedrun.md"
    text, before = file.read_text(), speedrun.table(speedrun.load(name))
    for record in speedrun.load(name).records:
        source = options.folder / record / "record.json"
        if not source.is_file():
            print(f"{record}: not measured")
            continue
        found = json.loads(source.read_text())
        if options.no_time:
            found["time"] = None
        elif options.times:
            timed = json.loads((options.times / record / "record.json").read_text())
            assert timed["arguments"] == found["arguments"], f"{record}: other settings"
            found |= {"time": timed["time"], "timed_runs": timed["n"]}
        if not found["valid"]:
            print(f"{record}: not valid: {found['mean']:.4f}, p = {found['p_value']}")
            continue
        kept = {key: found[key] for key in KEPT if found[key] is not None}
        line = ", ".join(f"{key} = {float(f'{value:.6g}') if key != 'n' else value}"
                         for key, value in kept.items())  # fmt: skip
        start = text.index(f"[records.{record}]")
        end = text.find("\n[", start + 1)
        end = len(text) if end < 0 else end
        own = re.sub(r"\nresult = .*", "", text[start:end].rstrip("\n"))
        text = f"{text[:start]}{own}\nresult = {{ {line} }}\n{text[end:]}"
        target = ROOT / "docs" / "results" / "speedrun" / f"{name}-{record}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{record}: {line}")
    file.write_text(text)
    assert before in page.read_text(), f"{page}: without the table of `normuon-train speedrun`"
    page.write_text(page.read_text().replace(before, speedrun.table(speedrun.load(name))))


if __name__ == "__main__":
    main()

"""What scripts/gpu_check.sh has found.

python scripts/gpu_results.py table OUT_FOLDER           the table, and results.json
python scripts/gpu_results.py losses MOST RUN RUN...     fails if losses differ by more than MOST
python scripts/gpu_results.py below LOSS RUN             fails unless the run's val_loss is below
"""

import json
import re
import sys
from pathlib import Path

# dense bf16 FLOP/s by name of the device, from NVIDIA's data sheets
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
PARTS = ("doctor", "text", "tests", "ddp", "fsdp", "losses", "gpt2-124m", "gpt2-350m",
         "track3-normuon", "optimizer", "gpt2", "sampling")  # fmt: skip


def losses(out: Path) -> list[float]:
    return [json.loads(row)["loss"] for row in (out / "metrics.jsonl").read_text().splitlines()]


def compare(most: float, runs: list[Path]) -> int:
    """Hold the losses of runs of one configuration against the first run's."""
    wanted, *others = (losses(run) for run in runs)
    off = {
        run.name: max(abs(a - b) for a, b in zip(found, wanted, strict=True))
        for run, found in zip(runs[1:], others)
    }
    print(json.dumps({"steps": len(wanted), "last loss": wanted[-1], "most off": off}))
    return int(not all(value <= most for value in off.values()))


def below(limit: float, run: Path) -> int:
    summary = json.loads((run / "summary.json").read_text())
    shown = ("val_loss", "tokens", "train_seconds", "tokens_per_second", "peak_memory")
    print(json.dumps({key: summary[key] for key in shown} | {"expected below": limit}))
    return int(not summary["val_loss"] < limit)


def said(text: str) -> object:
    """A part's result: its output or last line as JSON, else the last line itself."""
    last = (text.strip().splitlines() or [""])[-1]
    for candidate in (text, last):
        try:
            return json.loads(candidate)
        except ValueError:
            pass
    return last


def device_name(doctor: object) -> str:
    return next((name for name in PEAK if name in json.dumps(doctor)), "")


def shown(name: str, found: object, device: str) -> str:
    """A part's figures in one line."""
    if isinstance(found, dict) and "one process" in found and name != "optimizer":
        one = found["one process"]
        peak = PEAK.get(device, 0)
        mfu = f"{100e12 * one['TFLOP/s'] / peak:.1f} % MFU, " if peak else ""
        parts = {k[3:]: v for k, v in one.items() if k.startswith("ms ") and k != "ms per step"}
        return (
            f"{one['ms per step']:.1f} ms, {one['tokens per second']:,.0f} tokens/s, {mfu}"
            f"{one['peak memory, GB']:.1f} GB, micro-batch {one['micro-batch']:.0f}; "
            + ", ".join(f"{key} {value:.1f} ms" for key, value in parts.items())
        )
    if name == "optimizer" and isinstance(found, dict):
        rows = [
            f"{label}: NorMuon {row['NorMuon']:.2f}, torch.optim.Muon "
            f"{row['torch.optim.Muon']:.2f}, fused AdamW {row['fused AdamW']:.2f} ms"
            for label, row in found["one process"].items()
        ]
        shares = found["in training"].items()
        rows += [f"{label}: {row['percent of the step']:.1f} %" for label, row in shares]
        return "; ".join(rows)
    if name == "sampling":
        return (re.findall(r"[\d,]+ tokens/s", str(found)) or [str(found)])[-1]
    if name == "doctor":
        return device or "no known GPU"
    return found if isinstance(found, str) else json.dumps(found)


def table(out: Path) -> int:
    results = {}
    for name in PARTS:
        if (code := out / f"{name}.code").is_file():
            exit_code, seconds = map(int, code.read_text().split())
            text = (out / f"{name}.log").read_text(errors="replace")
            results[name] = {"exit_code": exit_code, "seconds": seconds, "said": said(text)}
            if name == "sampling":  # the speed is in the log, beside the text
                results[name]["said"] = (re.findall(r".*tokens/s", text) or [said(text)])[-1]
    device = device_name(results.get("doctor", {}).get("said"))
    lines = []
    for name in PARTS:
        part = results.get(name, {"exit_code": None, "seconds": 0, "said": "not run"})
        state = {0: "passed", None: "-"}.get(part["exit_code"], f"FAILED ({part['exit_code']})")
        figures = part["said"] if part["exit_code"] else shown(name, part["said"], device)
        lines.append(f"{name:<15} {state:<13} {part['seconds']:>4} s  {figures}")
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "table.txt").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(any(results.get(name, {}).get("exit_code") != 0 for name in PARTS))


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "table":
        sys.exit(table(Path(rest[0])))
    if what == "losses":
        sys.exit(compare(float(rest[0]), [Path(run) for run in rest[1:]]))
    sys.exit(below(float(rest[0]), Path(rest[1])))

"""Kill training runs a thousand times and see that nothing is lost.

usage: scripts/soak.sh [KILLS] [DIR]

Short runs, every fourth on two ranks, save, evaluate and sample often; every second one saves in
the background. They are killed by SIGKILL, half of the time at a file-system call of a save, else
at a random moment, and resumed until they complete. Then weights, optimizer state, metrics, samples
and summary must be those of a run that nothing happened to, but for times. No process waits for the
disk (os.fsync is replaced), since a killed process loses nothing it has written. DIR/state.json
counts, so that the command can be stopped and repeated. What is left of a run that differs is moved
to DIR/differs-N.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from support import TINY, WAIT, Forks, alive, outcome

from nanonormuon.storage.files import locked, replace_file

STEPS = 24
CALLS = 5  # file-system calls of half of a run's saves, about, by step
OFTEN = ["train.save_every=2", "train.eval_every=4", "train.sample_every=3"]
REPORT = 600  # seconds between lines


class Soak:
    """Runs of the data in `data`, killed until state["kills"] are reached."""

    def __init__(self, folder, forks, data, seed, steps=STEPS):
        self.folder, self.forks, self.out, self.steps = folder, forks, folder / "run", steps
        self.arguments = [*TINY, *OFTEN, f"train.steps={steps}", "train.sample_tokens=4"]
        self.arguments.append(f"data.path={data}")
        self.state = {"seed": seed, "trials": 0, "kills": 0, "in_save": 0, "runs": 0,
                      "two_ranks": 0, "differences": 0}  # fmt: skip
        if (folder / "state.json").exists():
            self.state = json.loads((folder / "state.json").read_text())
        self.wholes = {}  # by ranks: outcome and seconds of a run that nothing happens to

    def run(self, kills):
        """Go on until so many kills are done, in all; returns the state."""
        state, told = self.state, time.monotonic()
        while state["kills"] < kills or self.out.exists():
            self.trial(to_its_end=state["kills"] >= kills)
            replace_file(self.folder / "state.json", json.dumps(state).encode())
            if time.monotonic() - told > REPORT:
                told = time.monotonic()
                print(f"{time.strftime('%F %T')} {self}", flush=True)
        return state

    def __str__(self):
        return (
            "{kills} kills ({in_save} in a save), {runs} runs compared ({two_ranks} on two ranks), "
            "differences {differences}; seed {seed}"
        ).format(**self.state)

    def whole(self, ranks):
        if ranks not in self.wholes:
            out, begin = self.folder / f"whole-{ranks}", time.monotonic()
            shutil.rmtree(out, ignore_errors=True)
            codes, said = self.forks.run([*self.arguments, "--out", out], ranks)
            assert codes == [0] * ranks, said
            self.wholes[ranks] = outcome(out, self.steps), time.monotonic() - begin
        return self.wholes[ranks]

    def trial(self, to_its_end):
        """One process, or two, of the current run; killed unless they are faster."""
        state, out = self.state, self.out
        state["trials"] += 1
        dice = random.Random(f"{state['seed']}/{state['trials']}")
        ranks = 2 if state["runs"] % 4 == 3 else 1
        whole, seconds = self.whole(ranks)
        in_save = not to_its_end and 2 * state["in_save"] <= state["kills"]
        fault = f"save@{dice.randint(1, CALLS * self.steps)}" if in_save else ""
        more = ["--resume"] if (out / "config.toml").exists() else []
        more.append("train.save_async=" + ("on" if state["runs"] % 2 else "off"))
        if out.exists():  # a process of a command that was killed may still be writing
            with locked(out / ".lock", wait=True):
                pass
        started = self.forks.start([*self.arguments, *more, "--out", out], ranks, fault)
        until = begin = time.monotonic()
        until += WAIT if in_save or to_its_end else dice.uniform(0, 1.2 * seconds)
        while all(map(alive, started.pids)) and time.monotonic() < until:
            time.sleep(0.002)
        if all(map(alive, started.pids)):
            for pid in dice.choice([started.pids, started.pids[:1], started.pids[-1:]]):
                os.kill(pid, signal.SIGKILL)
        codes = started.wait(30)  # for a rank that waits for one that is gone
        if -signal.SIGKILL in codes:
            state["kills"] += 1
            state["in_save"] += in_save
            if {*codes} <= {0, 7, -signal.SIGKILL}:
                return
        if not more:  # all of it in one go: the machine is less busy now
            self.wholes[ranks] = whole, time.monotonic() - begin
        state["runs"] += 1
        state["two_ranks"] += ranks == 2
        found = outcome(out, self.steps) if codes == [0] * ranks else {"exit codes": codes}
        if found == whole:
            shutil.rmtree(out)
        else:
            state["differences"] += 1
            differing = [key for key in found if found[key] != whole.get(key)]
            kept = shutil.move(out, self.folder / f"differs-{state['runs']}")
            print(f"{kept}: {', '.join(differing)}; after trial {state['trials']}", flush=True)
            print("\n".join(started.said), flush=True)
        for log in self.forks.folder.iterdir():
            log.unlink()


def prepared(folder):
    """A data directory of some sentences."""
    from nanonormuon.text.prepare import prepare

    text = "the cat sat on a mat and saw one bird near that tree while rain fell"
    words = text.split()
    lines = (" ".join(words[(i * k + k) % 16] for k in range(1, 9)) + ".\n" for i in range(2500))
    (folder / "story.txt").write_text("".join(lines))
    prepare([folder / "story.txt"], folder / "data", "byte", 0.1)
    return folder / "data"


def main(kills="1000", folder="soak"):
    folder = Path(folder).absolute()
    (folder / "said").mkdir(parents=True, exist_ok=True)
    data = folder / "data" if (folder / "data").exists() else prepared(folder)
    soak = Soak(folder, Forks(folder / "said"), data, time.time_ns() % 10**6)
    print(f"{time.strftime('%F %T')} {soak}", flush=True)
    soak.run(int(kills))
    print(soak, flush=True)
    return int(soak.state["differences"] > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

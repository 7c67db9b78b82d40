"""After a fault a run ends quickly, with the right message, and loses nothing: processes killed at
random moments and at every point and file-system call of a save, signals in every part of a run,
ranks that fail, hang or diverge.

Random moments come from a seed that is printed; set FAULT_SEED to repeat it. More trials: pytest -m
full
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import soak
from safetensors.torch import load_file
from support import FSYNC, LATENT, ROOT, WAIT, Forks, alive, final, outcome

from nanonormuon.checkpoint import Saver
from nanonormuon.errors import Interrupted
from nanonormuon.runtime.distributed import World
from nanonormuon.runtime.faults import Stopping
from nanonormuon.storage import checkpoints as checkpoint
from nanonormuon.storage.run import read_rows

STEPS = 12
KILLS = int(os.environ.get("FAULT_KILLS", "100"))  # at random moments
RUNS = int(os.environ.get("FAULT_RUNS", "50"))  # of two ranks, one after the other
FSDP = "train.parallel=fsdp"
ASYNC = "train.save_async=on"


@pytest.fixture(scope="module")
def seed():
    seed = int(os.environ.get("FAULT_SEED", time.time_ns() % 10**6))
    print(f"FAULT_SEED={seed}")
    return seed


@pytest.fixture(scope="module")
def short(tiny):
    """A run that saves after every second step, evaluates and samples after every fourth."""
    often = ["train.save_every=2", "train.sample_every=4", "train.sample_tokens=2"]
    return [*tiny, f"train.steps={STEPS}", *often]


@pytest.fixture(scope="module")
def whole(short, forks, tmp_path_factory):
    """The outcome of a run without faults."""
    out = tmp_path_factory.mktemp("whole") / "run"
    codes, said = forks.run([*short, "--out", out])
    assert codes == [0], said
    return outcome(out, STEPS)


def ends_alike(forks, short, out, whole):
    """Resume without a fault: the run must end as if nothing had happened."""
    codes, said = forks.run([*short, *(["--resume"] if saved(out) else []), "--out", out])
    assert codes == [0], said
    assert outcome(out, STEPS) == whole


def saved(out):
    return (Path(out) / "config.toml").exists()


# ------------------------------------------------------------------------------------------------
# Killed


# in this order, one process after the other: save_every is 2, eval_every and sample_every are 4
POINTS = ["record:2", "write:2", "retain:4", "evaluated:4", "sample:4", "record:8", "write:8",
          "evaluation:8", "announce:8", "record:12", "announce:12", "summary:12"]  # fmt: skip


def killed_at(points, forks, short, out, whole):
    """Kill a run and its resumptions at one point after the other: it ends as if none had been."""
    for point in points:
        more = ["--resume"] if saved(out) else []
        codes, said = forks.run([*short, *more, "--out", out], fault=f"kill@{point}")
        assert codes == [-signal.SIGKILL], (point, said)
    ends_alike(forks, short, out, whole)


def test_a_signal_that_an_import_swallows_still_ends_the_run():
    """As torch does with an exception while it imports numpy."""
    with pytest.raises(Interrupted) as error, Stopping() as stopping:
        with contextlib.suppress(Interrupted):
            stopping.note(15, None)
        raise ImportError("cannot load module more than once per process")
    assert error.value.code == 143


def test_killed_around_a_save(forks, short, tmp_path, whole):
    """Between row and checkpoint, between checkpoint and evaluation."""
    killed_at(["write:4", "evaluation:4"], forks, short, tmp_path / "run", whole)


@pytest.mark.slow
def test_killed_at_each_point_around_a_save(forks, short, tmp_path, whole):
    killed_at(POINTS, forks, short, tmp_path / "run", whole)


@pytest.mark.slow
def test_killed_at_each_point_while_a_save_goes_on(forks, short, tmp_path, whole):
    """Each in a run of its own: which steps are saved in the background before the process ends is
    chance, so a resumed run may begin after the next point."""
    for point in POINTS:
        killed_at([point], forks, [*short, ASYNC], tmp_path / point, whole)


@pytest.mark.full
def test_killed_at_random_moments(seed, forks, shards, tmp_path):
    """Half of the time in a save, on one rank and on two; a thousand times: scripts/soak.sh."""
    (tmp_path / "said").mkdir()
    own = Forks(tmp_path / "said")
    found = soak.Soak(tmp_path, own, shards, seed, STEPS).run(KILLS)
    own.close()
    assert found["in_save"] >= 0.4 * KILLS and found["runs"] > 3 and found["two_ranks"], found
    assert found["differences"] == 0, found


FILES = {"model.safetensors": [b"wei", b"ghts"], "optimizer.safetensors": b"buffers",
         "config.json": b"{}"}  # fmt: skip


def save(folder, step):
    checkpoint.write(folder, step, FILES | {"state.json": b'{"step": %d}' % step})
    checkpoint.retain(folder, 2, step)


def in_child(work, wait=True):
    """Run `work` in a forked process. Returns its exit code, or its pid if not `wait`."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if wait else pid
    try:
        work()
        os._exit(0)
    except OSError:
        os._exit(8)
    finally:
        os._exit(1)


def test_killed_at_every_file_system_call_of_a_save_and_of_a_deletion(tmp_path):
    import faulty

    for number in range(1, 200):
        folder = tmp_path / str(number) / "checkpoints"
        for step in (2, 4):
            save(folder, step)

        def work(number=number, folder=folder):
            faulty.on_disk(number, "checkpoints")
            save(folder, 6)

        code = in_child(work)
        found = checkpoint.newest(folder)[1]["step"]
        checkpoint.sweep(folder)
        save(folder, 6 if found == 4 else 8)  # leftovers do not disturb the next save
        assert len(checkpoint.all_steps(folder)) == 2
        checkpoint.newest(folder)
        if code == 0:
            break
        assert code == -9 and found in (4, 6), number
    assert number > 20  # a save makes more calls than this


def under_strace(work, inject):
    """Run `work` in a forked process, with faults that strace injects into its system calls, which
    no patch of a Python function reaches. Returns the exit code."""
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    go, signal_go = os.pipe()

    def work_when_traced():
        os.fsync = FSYNC
        os.read(go, 1)
        work()

    pid = in_child(work_when_traced, wait=False)
    command = ["strace", "-qq", "-o", "/dev/null", "-p", str(pid), "-e", f"inject={inject}"]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while "TracerPid:\t0" in Path(f"/proc/{pid}/status").read_text() and tracer.poll() is None:
        time.sleep(0.002)
    refused = tracer.poll() is not None
    os.write(signal_go, b"x")
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(go), os.close(signal_go)
    if refused:
        pytest.skip(f"strace may not be used here: {tracer.stderr.read().strip()}")
    tracer.wait()
    return code


def fail_at(call, fault, number, folder):
    """Inject a fault into a save, which must spare older checkpoints. True if it was reached."""
    for step in (2, 4):
        save(folder, step)
    code = under_strace(lambda: save(folder, 6), f"{call}:{fault}:when={number}")
    assert code in (0, 8, -9), code
    found = checkpoint.newest(folder)[1]["step"]
    assert found == 6 if code == 0 else found in (4, 6)
    checkpoint.sweep(folder)
    save(folder, 8)  # the next save works
    assert checkpoint.newest(folder)[1]["step"] == 8
    return code != 0


CALLS = ["openat", "mkdir", "write", "fsync", "rename", "close", "unlinkat", "getdents64"]
FAULTS = ["error=ENOSPC", "error=EIO", "error=EROFS", "error=EMFILE", "error=EACCES", "signal=KILL"]


def test_a_system_call_of_a_save_that_fails(seed, tmp_path):
    dice = random.Random(seed)
    reached = [
        fail_at(call, dice.choice(FAULTS), dice.randint(1, 3), tmp_path / f"{call}" / "checkpoints")
        for call in CALLS[:5]
    ]
    assert sum(reached) >= 3


@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("call", CALLS)
def test_every_system_call_of_a_save_that_fails(call, fault, tmp_path):
    number, missed = 0, 0
    while missed < 3:  # a failed clean-up does not fail the save
        number += 1
        missed += not fail_at(call, fault, number, tmp_path / str(number) / "checkpoints")
    assert number > 3 or call in ("unlinkat", "getdents64", "close", "openat", "mkdir")


# ------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("fault", "code", "step"),
    [
        ("term@open", 143, 0),
        ("int@compile", 130, 0),
        ("int@data:3", 130, 4),
        ("term@step:4", 143, 5),
        ("term@write:2", 143, 2),
        ("int@evaluation:4", 130, 4),
    ],
)
def test_a_signal_in_any_part_of_a_run(fault, code, step, ranks, forks, short, tmp_path, whole):
    """The step is finished and saved on all ranks; before the first step nothing is saved."""
    if ranks == 2 and not step:
        pytest.skip("torchrun signals every rank itself")
    out = tmp_path / "run"
    codes, said = forks.run([*short, "--out", out], ranks, fault)
    assert codes == [code] * ranks, said
    assert "Traceback" not in "".join(said)
    if step:
        saved_at = checkpoint.newest(out / "checkpoints")[1]["step"]
        assert saved_at == step or ("data" in fault and saved_at == step + 1)  # data are read ahead
        assert f"after step {saved_at}, which is saved" in said[0]
    else:
        assert "before its first step" in said[0] and not checkpoint.all_steps(out / "checkpoints")
    if ranks == 1:
        ends_alike(forks, short, out, whole)


def test_a_signal_to_one_rank_saves_on_both(forks, short, tmp_path):
    codes, said = forks.run([*short, "--out", tmp_path / "run"], 2, "term@step:4:1")
    assert codes == [143, 143] and "after step 5, which is saved" in said[0], said
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[1]["step"] == 5


def test_a_second_signal_ends_at_once_with_the_old_checkpoint_intact(forks, short, tmp_path, whole):
    codes, said = forks.run([*short, "--out", tmp_path / "run"], fault="twice@write:4")
    assert codes == [143] and "is saved" not in said[0]
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[1]["step"] == 2
    ends_alike(forks, short, tmp_path / "run", whole)


def test_the_first_signal_after_a_failed_save_is_no_second_one(tmp_path, monkeypatch, caplog):
    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    stopping, failed = Stopping(), Future()
    stopping.finish_steps()
    failed.set_exception(OSError("no space"))
    Saver(tmp_path, World(0, 1, "cpu"), stopping, True).end_if_failed(failed)
    assert stopping.number == signal.SIGTERM and "no space" in caplog.text
    stopping.note(signal.SIGINT, None)
    assert stopping.number == signal.SIGINT
    with pytest.raises(SystemExit, match="130"):
        stopping.note(signal.SIGINT, None)


def test_a_signal_while_torch_is_being_imported(short, tmp_path):
    done = torchrun(0, [*short, "--out", tmp_path / "run"], "term@import")
    assert done.returncode == 143 and "before its first step" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------
# Ranks that fail


def torchrun(ranks, arguments, fault=""):
    """Run as users do, with a fault; ranks = 0: without torchrun. Returns when the last process has
    ended. The result's `times`: when it started, when the fault came, when it ended."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, *(launch if ranks else []), str(ROOT / "tests" / "faulty.py"),
         *map(str, arguments)],
        capture_output=True, text=True, timeout=WAIT, env={**os.environ, "FAULT": fault},
    )  # fmt: skip
    done.times = (begin, *fault_time(done.stderr), time.monotonic())
    return done


def fault_time(stderr):
    """When the fault came, by the monotonic clock, as a list; empty if it did not."""
    return [float(x) for x in re.findall(r"^fault at ([\d.]+)$", stderr, re.M)][:1]


def ends_quickly(times):
    """Whether it ended within 10 s of the fault or, on a busy machine, within twice the time before
    the fault. A wait for a time limit would take 900 s, for torchrun's own 30 s."""
    begin, fault, end = times
    print(f"{end - fault:.1f} s after the fault, which came after {fault - begin:.1f} s")
    return end - fault < max(10, 2 * (fault - begin))


def first_failure(stderr):
    """The part of torchrun's last lines about the failure that came first."""
    return stderr.rpartition("Root Cause (first observed failure):")[2]


def running(out):
    """Ids of live processes with this run directory in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(out).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return [pid for pid in found if alive(pid)]


def of_session(leader):
    """Ids of live processes in this session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            session = path.read_text().rpartition(")")[2].split()[3]
        except OSError:
            continue
        if int(session) == leader:
            found.append(int(path.parent.name))
    return [pid for pid in found if alive(pid)]


@pytest.mark.slow
def test_the_launcher_reports_the_rank_that_failed_first(short, tmp_path):
    done = torchrun(2, [*short, "--out", tmp_path / "run"], "raise@data:4:1")
    cause = first_failure(done.stderr)
    assert done.returncode == 1 and "rank      : 1 " in cause
    wanted = "rank 1, step [45], data: ZeroDivisionError: division by zero"  # it is read ahead
    assert re.search(wanted, cause)
    assert "division by zero" in (tmp_path / "run" / "errors" / "rank-1.txt").read_text()
    assert not (tmp_path / "run" / "errors" / "rank-0.txt").exists()
    assert running(tmp_path / "run") == [] and ends_quickly(done.times)


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_job(short, tmp_path):
    done = torchrun(2, [*short, "--out", tmp_path / "run"], "kill@step:4:1")
    cause = first_failure(done.stderr)
    assert "rank      : 1 " in cause and "SIGKILL" in cause and done.returncode == 1
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[1]["step"] == 4
    assert running(tmp_path / "run") == [] and ends_quickly(done.times)


@pytest.mark.full
@pytest.mark.parametrize("more", [[], [FSDP]])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise@step:4:1", "rank 1, step 4, step: ZeroDivisionError"),
        ("raise@step:4:0", "rank 0, step 4, step: ZeroDivisionError"),
        ("eio@write:4:0", "rank 0, step 4, save: [Errno 9] Bad file descriptor"),
        ("raise@gather:4:1", "rank 1, step 4, save: ZeroDivisionError"),
        ("raise@evaluation:4:1", "rank 1, step 4, evaluation: ZeroDivisionError"),
        ("raise@open:0:1", "rank 1, step 0, start: ZeroDivisionError"),
        ("kill@gather:4:1", "SIGKILL"),
        ("kill@write:4:0", "SIGKILL"),
        ("kill@data:3:0", "SIGKILL"),
        ("exit@step:4:1", "exitcode  : 3 "),
    ],
)
def test_every_way_in_which_a_rank_can_fail(fault, words, more, forks, short, tmp_path):
    """Under torchrun's launcher, whose ranks are forks here; the tests above start torchrun."""
    begin = time.monotonic()
    launched = forks.start([2, *short, *more, "--out", tmp_path / "run"], 1, fault, "launch")
    (code,), (said,) = launched.wait(), launched.said
    cause = first_failure(said)
    assert code == 1 and words in cause, said
    assert f"rank      : {fault[-1]} " in cause
    assert ends_quickly((begin, *fault_time(said), time.monotonic()))
    assert of_session(launched.pids[0]) == []
    if checkpoint.all_steps(tmp_path / "run" / "checkpoints"):
        assert checkpoint.newest(tmp_path / "run" / "checkpoints")[1]["step"] in (2, 4)


@pytest.mark.parametrize("more", [[], [FSDP], [FSDP, ASYNC]])
def test_a_failed_save_ends_all_ranks_alike(more, forks, short, tmp_path):
    """Also in the middle of gathering shards; in the background, in a step soon after."""
    codes, said = forks.run([*short, *more, "--out", tmp_path / "run"], 2, "eio@write:4:0")
    assert codes == [8, 8], said
    step = r"step [4-6]" if ASYNC in more else "step 4"
    assert re.search(rf"rank 0, {step}, save: \[Errno 9\] Bad file descriptor", said[0])
    assert re.search(rf"rank 1, {step}, save: rank 0: \[Errno 9\] Bad file descriptor", said[1])
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[1]["step"] == 2


def test_a_rank_that_leaves_does_not_leave_the_others_waiting(forks, short, tmp_path):
    """Also without a launcher that reports it."""
    start = time.monotonic()
    codes, said = forks.run([*short, "--out", tmp_path / "run"], 2, "leave@step:4:1")
    assert codes == [7, 0] and time.monotonic() - start < 300  # not the time limit of 900
    assert "another rank failed or is gone" in said[0]


@pytest.mark.slow
def test_ranks_end_with_their_launcher_after_saving(short, tmp_path):
    out = tmp_path / "run"
    done = torchrun(2, [*short, "train.steps=100_000", "--out", out], "launcher@step:4:1")
    assert done.returncode == -9  # (communicate() returns when the last rank has closed stderr)
    assert "torchrun is gone" in done.stderr and "which is saved" in done.stderr
    for _ in range(6000):
        if not running(out):
            break
        time.sleep(0.05)
    assert running(out) == []
    assert checkpoint.newest(out / "checkpoints")[1]["step"] >= 4


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_on_all_ranks(short, tmp_path):
    out = tmp_path / "run"
    done = torchrun(2, [*short, "train.steps=100_000", "--out", out], "launcher-term@step:4:1")
    assert done.returncode == 1 and "which is saved" in done.stderr
    assert checkpoint.newest(out / "checkpoints")[1]["step"] >= 5
    assert running(out) == []


@pytest.mark.slow
def test_a_hang_ends_with_every_ranks_stack(forks, short, tmp_path):
    limited = [*short, "train.sample_every=0", "train.time_limit=15", "--out", tmp_path / "run"]
    codes, said = forks.run(limited, 2, "hang@step:4:1")
    assert codes == [7, 7], said
    for rank in (0, 1):
        text = (tmp_path / "run" / "errors" / f"rank-{rank}.txt").read_text()
        assert f"rank {rank}, step 4, step: took more than 15 s (train.time_limit = 15)" in text
        assert "in take_step" in text and ("in <lambda>" in text) == (rank == 1)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[1]["step"] == 4


@pytest.mark.full
def test_a_stopped_process_is_a_hang_too(short, tmp_path):
    done = torchrun(2, [*short, "train.time_limit=15", "--out", tmp_path / "run"], "stop@step:4:1")
    assert "rank 0, step 4, step: took more than 15 s" in first_failure(done.stderr)
    assert running(tmp_path / "run") == []


@pytest.mark.full
def test_many_runs_of_two_ranks_end_cleanly(forks, short, tmp_path):
    brief = ["train.steps=1", "train.sample_tokens=0", "data.val_tokens=64"]
    for i in range(RUNS):
        layout, out = f"train.parallel={('ddp', 'fsdp')[i % 2]}", tmp_path / str(i)
        codes, said = forks.run([*short, *brief, layout, "--out", out], 2)
        assert codes == [0, 0], (i, said)
        assert not re.search("terminate called|Aborted|core dumped|Traceback", "".join(said))


# ------------------------------------------------------------------------------------------------
# Numbers


DDP, FSDP2 = [], [FSDP]
TWO, MORE = [(2, DDP), (2, FSDP2)], [(4, DDP), (4, FSDP2), (3, FSDP2)]


@pytest.mark.parametrize(
    ("dtype", "axis", "model", "layouts"),
    [
        ("bf16", "longest", [], TWO),
        pytest.param("bf16", "rows", LATENT, [(3, FSDP2)], marks=pytest.mark.slow),
        pytest.param("bf16", "longest", [], MORE, marks=pytest.mark.slow),
        pytest.param("bf16", "rows", [], TWO + MORE, marks=pytest.mark.full),
        pytest.param("fp32", "longest", [], TWO + MORE, marks=pytest.mark.full),
    ],
)
def test_canonical_runs_end_in_the_same_bits_on_one_two_and_four_ranks(
    dtype, axis, model, layouts, forks, short, tmp_path
):
    """With every train.parallel; also when a single process resumes a run of several."""
    settings = ["train.canonical=true", "train.micro_batch=1", "train.eval_every=0"]
    settings += ["train.sample_tokens=0", "data.val_tokens=64", "train.save_every=0"]
    settings += ["train.batch_tokens=128"] if layouts is TWO else []  # two micro-batches each
    settings += [f"train.dtype={dtype}", f"optim.neuron_axis={axis}", "optim.cautious=true"]
    settings += [*model, "optim.grad_clip=0.5", "train.steps=3"]
    one, parts = tmp_path / "one", tmp_path / "parts"

    def run(out, ranks, *more):
        codes, said = forks.run([*short, *settings, *more, "--out", out], ranks)
        assert codes == [0] * ranks, said

    def ratios(out):
        return [row["update_ratio"] for row in read_rows(out / "metrics.jsonl")]

    run(one, 1)
    assert max(ratios(one)) > 0
    for ranks, layout in layouts:
        run(out := tmp_path / f"{ranks}{layout}", ranks, *layout)
        assert final(out, 3) == final(one, 3), (ranks, layout)
        assert ratios(out) == pytest.approx(ratios(one), rel=1e-5), (ranks, layout)
    run(parts, layouts[-1][0], FSDP, "train.stop_at=2")
    run(parts, 1, "--resume")
    assert final(parts, 3) == final(one, 3)


@pytest.mark.parametrize(
    ("ranks", "more"), [(1, []), (2, [FSDP]), pytest.param(2, [], marks=pytest.mark.slow)]
)
def test_memory_is_written_before_it_is_read(ranks, more, forks, short, tmp_path):
    """A run whose new tensors are filled with NaN never reads one."""
    often = ["train.sample_every=2", "train.eval_every=2", "train.steps=4", "train.dtype=bf16"]
    codes, said = forks.run([*short, *often, *more, "--out", tmp_path], ranks, "nan@memory")
    assert codes == [0] * ranks, said


@pytest.mark.parametrize(
    "more", [pytest.param([], id="ddp"), pytest.param([FSDP], id="fsdp", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("place", ["loss", "gradient", "weight", "buffer"])
def test_a_nan_on_one_rank_stops_all_before_the_update(place, more, forks, short, tmp_path):
    out = tmp_path / "run"
    codes, said = forks.run([*short, *more, "--out", out], 2, f"nan@{place}:5:1")
    assert codes == [5, 5], said
    wanted = (
        f"the {place} of step 5" if place in ("loss", "gradient") else f"a {place} before step 5"
    )
    report = json.loads((out / "crash-000005.json").read_text())
    assert report["step"] == 5 and report["config"]["train"]["batch_tokens"] == 384
    assert all(f"not finite: {wanted}" in text for text in said)
    if place != "gradient":  # an averaged gradient does not show which rank is at fault
        assert report["rank"] == 1 and "(rank 1, sequences 6 to 11" in said[1]
    assert place in ("loss", "gradient") or "mlp" in report["not_finite"][0]
    for path in checkpoint.all_steps(out / "checkpoints"):
        checkpoint.verify(path)
        for name in ("model", "optimizer"):
            assert all(t.isfinite().all() for t in load_file(path / f"{name}.safetensors").values())
    steps = [checkpoint.step_of(p) for p in checkpoint.all_steps(out / "checkpoints")]
    assert steps == ([2, 4, 5] if place in ("loss", "gradient") else [2, 4])


def test_a_rank_that_diverges_is_named(forks, short, tmp_path):
    codes, said = forks.run([*short, "--out", tmp_path / "run"], 2, "bit@weight:5:1")
    assert codes == [7, 7], said
    assert "rank 1 differs from rank 0" in said[1]
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[1]["step"] == 4

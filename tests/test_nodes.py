"""Several nodes: train.parallel = hsdp shards within a node and replicates across nodes. A node
here is a torchrun of its own, or some ranks, by LOCAL_WORLD_SIZE."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from support import ROOT, WAIT, final, losses, reserved_port, run

from nanonormuon.config import flat, load
from nanonormuon.errors import ConfigError, Diverged, describe
from nanonormuon.runtime import distributed, faults, health
from nanonormuon.runtime.distributed import World

HSDP = "train.parallel=hsdp"
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------
# What a rank decides by itself


def launched(monkeypatch, rank, local_rank, local, size):
    """Be this rank, as torchrun says it."""
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    for name, value in zip(names, (rank, local_rank, local, size)):
        monkeypatch.setenv(name, str(value))
    return World(rank, size, CPU)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([1], "found 1 to 1 on a node, 1 in all; or set train.parallel=fsdp"),
        ([4], "found 4 to 4 on a node, 4 in all; or set train.parallel=fsdp"),
        ([1, 1], "found 1 to 1 on a node, 2 in all; or set train.parallel=fsdp"),
        ([2, 1], "found 1 to 2 on a node, 3 in all; or set train.parallel=fsdp"),
        ([1, 3], "found 1 to 3 on a node, 4 in all; or set train.parallel=fsdp"),
        ([2, 2], ""),
        ([3, 3, 3], ""),
    ],
)
def test_hsdp_is_refused_on_every_rank_or_on_none(nodes, words, monkeypatch):
    ranks, everyone = [(i, local) for local in nodes for i in range(local)], []
    config = load([HSDP])[0]

    def largest(values):
        everyone.append(values)
        return [float(max(column)) for column in zip(*everyone)]

    monkeypatch.setattr(distributed, "largest", largest)
    for again in (False, True):  # at first to hear all ranks
        for rank, (local_rank, local) in enumerate(ranks):
            world = launched(monkeypatch, rank, local_rank, local, len(ranks))
            refused = contextlib.suppress(ConfigError) if not again else contextlib.nullcontext()
            if again and words:
                refused = pytest.raises(ConfigError, match=words)
            with refused:
                distributed.check_nodes(config.train.parallel, world)


def test_ranks_that_are_not_numbered_node_by_node_are_refused(monkeypatch):
    """As SLURM numbers them with --distribution=cyclic; shards would lie across nodes."""
    monkeypatch.setattr(distributed, "largest", lambda values: list(map(float, values)))
    config = load([HSDP])[0]
    for rank, local_rank, local in ((2, 1, 2), (3, 3, 3)):  # the second: 4 are not 3 + 3
        with pytest.raises(ConfigError, match="numbered node by node, found"):
            distributed.check_nodes(
                config.train.parallel, launched(monkeypatch, rank, local_rank, local, 4)
            )


def test_a_rank_without_the_address_of_the_first_is_refused(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # start would set the threads
    launched(monkeypatch, 0, 0, 2, 2)
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        distributed.start("cpu", 60.0)


def test_settings_that_differ_between_ranks_are_named_on_the_rank_that_has_them(monkeypatch):
    """Each node has its own command line, and perhaps its own copy of the data."""
    first, other = (flat(load(["train.seed=1", more])[0]) for more in ("optim.lr=1", "optim.lr=2"))
    monkeypatch.setattr(distributed, "from_first", lambda *_: first)
    monkeypatch.setattr(distributed, "largest", lambda _: [1.0])
    for found, words, follows in ((other, "has optim.lr = 2.0, not 1.0$", False),
                                  (first, "rank 1 has them$", True)):  # fmt: skip
        with pytest.raises(ConfigError, match=words) as error:
            distributed.check_alike(found, World(1, 2, CPU))
        assert error.value.follows == follows
    monkeypatch.setattr(distributed, "largest", lambda flags: flags)
    distributed.check_alike(first, World(1, 2, CPU))


@pytest.mark.parametrize("name", ["--resume", "builtin data", "tokenizer"])
def test_what_decides_which_collectives_a_rank_takes_part_in_is_compared(
    name, tiny, tmp_path, monkeypatch
):
    def from_first(value):
        return value | {name: True} if isinstance(value, dict) else value

    monkeypatch.setattr(distributed, "from_first", from_first)
    with pytest.raises(ConfigError, match=rf"rank 0 has {name} = \S+, not True"):
        run([*tiny, "train.steps=1"], tmp_path / "run")


def test_a_shard_that_differs_from_the_other_nodes_is_named(monkeypatch):
    """Of four ranks, two on a node, the last; the first two hold different shards of one copy."""
    w, off = torch.arange(4.0), [0.0, 1.0, 0.0, 1.5]
    monkeypatch.setattr(health, "pieces", lambda _: 2)
    monkeypatch.setattr(distributed, "gather", lambda x: everyone.expand(-1, len(x)))
    everyone = torch.tensor([[(w + x).view(torch.int32).sum()] for x in off])
    with pytest.raises(Diverged, match=r"rank 3 differs from rank 1 in .* first a:") as e:
        health.check_state({"a": w, "b": w}, 5, World(0, 4, CPU))
    assert e.value.follows
    everyone[3] = everyone[1]
    health.check_state({"a": w}, 5, World(0, 4, CPU))


def test_a_lost_rank_is_looked_for_on_the_other_nodes(monkeypatch):
    stopping = faults.Stopping()
    monkeypatch.setattr(faults, "GRACE", 0.0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    gone = "Connection closed by peer [10.0.0.7]:2345"
    for rank, local, size, others in ((5, 2, 8, "0 to 3 or 6 to 7"), (0, 2, 4, "2 to 3"),
                                      (3, 2, 4, "0 to 1"), (1, 4, 4, "")):  # fmt: skip
        launched(monkeypatch, rank, rank % local, local, size)
        error = RuntimeError(gone)
        with contextlib.suppress(RuntimeError), faults.Watch(0, stopping):
            raise error
        where = f"one of the ranks {others}, on another node," if others else "another rank"
        assert f"start: {where} failed or is gone: see that rank's log ({gone})" in describe(error)


# ------------------------------------------------------------------------------------------------
# Two nodes of two ranks


def two_nodes(forks, arguments, fault="", second=()):
    """(exit codes, standard error) of two launchers, each with two ranks, as two machines start
    them; `second`: further arguments of the second."""
    port = reserved_port()
    nodes = [
        forks.start([f"2/{node}/2/{port}", *arguments, *more], 1, fault, "launch")
        for node, more in enumerate(((), second))
    ]
    codes = [node.wait()[0] for node in nodes]
    return codes, [node.said[0] for node in nodes]


@pytest.mark.slow
def test_two_nodes_follow_one_process_which_resumes_them_and_is_resumed(tiny, forks, tmp_path):
    longer = [*tiny, "train.steps=12", "train.sample_tokens=0"]
    parts = tmp_path / "parts"
    codes, said = two_nodes(forks, [*longer, HSDP, "train.stop_at=4", "--out", parts])
    assert codes == [0, 0], said
    run([*longer, "train.stop_at=8"], parts, resume=True)
    more = [HSDP, "train.reshard=false", "train.micro_batch=1", "--resume", "--out", parts]
    codes, said = two_nodes(forks, [*longer, *more])
    assert codes == [0, 0], said
    run(longer, tmp_path / "one")
    assert losses(parts) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert len(losses(parts)) == 12


@pytest.mark.slow
def test_a_node_that_is_gone_ends_the_other_which_names_its_ranks(tiny, forks, tmp_path):
    out, limit = tmp_path / "run", "train.time_limit=600"
    arguments = [*tiny, HSDP, limit, "train.save_every=2", "train.sample_tokens=0", "--out", out]
    codes, said = two_nodes(forks, arguments, "node@step:4:3")
    assert codes == [1, -9], said
    assert "step 4, step: one of the ranks 2 to 3, on another node, failed or is gone" in said[0]
    cause = said[0].rpartition("Root Cause (first observed failure):")[2]
    assert "one of the ranks 2 to 3, on another node" in said[0].partition("Failures:")[2] + cause
    assert "took more than" not in said[0]
    assert max((out / "checkpoints").iterdir()).name == "step-000004"


@pytest.mark.slow
def test_nodes_started_differently_end_before_anything_is_made(tiny, forks, tmp_path):
    codes, said = two_nodes(forks, [*tiny, "--out", tmp_path / "run"], second=["optim.lr=0.5"])
    assert codes == [1, 1] and "rank 2 has optim.lr = 0.5, not " in said[1], said
    assert "start: expected rank 0's settings" in said[0] and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_canonical_run_has_the_same_bits_on_two_nodes(tiny, forks, tmp_path):
    settings = ["train.canonical=true", "train.micro_batch=1", "train.eval_every=0"]
    settings += ["train.steps=3", "train.sample_tokens=0", "optim.grad_clip=0.5"]
    for name, ranks, more in (("one", 1, []), ("nodes", 4, [HSDP])):
        out = ["--out", tmp_path / name]
        codes, said = forks.run([*tiny, *settings, *more, *out], ranks, nodes=2 if more else 1)
        assert codes == [0] * ranks, said
    assert final(tmp_path / "nodes") == final(tmp_path / "one")


@pytest.mark.slow
def test_a_bit_that_differs_between_nodes_is_not_saved(tiny, forks, tmp_path):
    arguments = [*tiny, HSDP, "--out", tmp_path / "run"]
    codes, said = forks.run(arguments, 4, "bit@weight:4:2", nodes=2)
    assert codes == [7] * 4, said
    assert all("rank 2 differs from rank 0" in text for text in said)
    assert max((tmp_path / "run" / "checkpoints").iterdir()).name == "step-000003"


PAGE = (ROOT / "docs" / "multinode.md").read_text(encoding="utf-8")


def test_the_pages_commands_are_what_torchrun_and_the_configuration_take():
    parser = torch.distributed.run.get_args_parser()
    commands = re.findall(r"^torchrun (.*)$", PAGE, re.M)
    nodes = [parser.parse_args(shlex.split(line)) for line in commands]
    assert [node.node_rank for node in nodes] == [0, 1]
    for node in nodes:
        assert (node.nnodes, node.training_script) == ("2", "train.py")
        settings = node.training_script_args
        assert load(settings[: settings.index("--out")])[0].train.parallel == "hsdp"


STAND_INS = {  # of a cluster of two nodes, both of which are this machine
    "scontrol": "echo 127.0.0.1; echo other",
    "srun": """nodes="0 1"
while [[ $1 == --* ]]; do [[ $1 != --nodes=1 ]] || nodes=0; shift; done
for node in $nodes; do SLURM_NODEID=$node "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit ${code:-0}""",
}


@pytest.mark.slow
def test_the_script_for_slurm_starts_stops_and_goes_on(tiny, tmp_path):
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "a,b", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "2"}
    slurm |= {"SLURM_JOB_ID": f"{os.getpid()}-test", "PORT": str(reserved_port())}
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = ["bash", str(ROOT / "scripts" / "slurm_two_nodes.sh"), str(tmp_path / "run"), *tiny]
    script += ["train.sample_tokens=0", "train.eval_every=0", "train.steps=100_000"]
    for words in ("writing to", "resumed from"):
        job = subprocess.Popen(
            script, cwd=ROOT, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
            env=os.environ | slurm | {"PATH": path},
        )  # fmt: skip
        said = ""
        for line in job.stderr:
            if line.startswith("step ") and "\nstep " not in said:
                job.terminate()  # as SLURM does before the job's time is over
            said += line
        assert job.wait(WAIT) == 1 and "which is saved" in said and words in said, said

"""The environment that the tests run in, and fixtures that many of them share: a small corpus of
learnable text, prepared once, and a trained run. Helper functions are in support.py."""

import os
import tempfile
from pathlib import Path

import defects
import pytest
from support import ROOT, TINY, Forks

# What a shell has set must not decide what a test finds. Variables with these names or prefixes are
# removed, then those below are set, for this process and all that it starts. torch reads some when
# it is imported, so this comes before.
REMOVED = (
    "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "WANDB_", "NANONORMUON_", "PYTHON", "LC_", "LANGUAGE",
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_",
    "TORCHELASTIC_", "TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", "XDG_CACHE_HOME",
    "FORCE_COLOR", "NO_COLOR", "COLUMNS",
)  # fmt: skip
scratch = tempfile.TemporaryDirectory(prefix="nanonormuon-tests-")
SET = {
    "OMP_NUM_THREADS": "1",  # the work is small; threads that wait for each other cost more,
    "OMP_WAIT_POLICY": "passive",  # and a thread that spins takes a busy machine's time
    "NO_PROXY": "127.0.0.1",
    "LC_ALL": "C.UTF-8",
    "LANG": "C.UTF-8",
    "PYTHONPATH": str(ROOT),  # processes import this checkout, whatever is installed
    "XDG_CACHE_HOME": scratch.name,
    "NANONORMUON_CACHE": f"{scratch.name}/nanonormuon",
}
if (cache := ROOT.parent / "shared" / "tiktoken_cache").is_dir():
    SET["TIKTOKEN_CACHE_DIR"] = str(cache)
if os.environ.keys() & {"CI", "PYTEST_XDIST_WORKER"}:  # .ci/run or pytest -n auto has one for all
    SET["NANONORMUON_CACHE"] = os.environ.get("NANONORMUON_CACHE", SET["NANONORMUON_CACHE"])
if not Path("/dev/nvidiactl").exists():  # with GPUs it says which of them may be used
    REMOVED += ("CUDA_VISIBLE_DEVICES",)
for name in list(os.environ):
    if name.startswith(REMOVED):
        del os.environ[name]
os.environ.update(SET)

os.fsync = os.fstat  # which fails as well where there is no file, and does not wait for the disk
defects.apply()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Processes of `pytest -n auto`. Each loads torch, and many tests start several ranks."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give each process a stretch of the tests, so that few files are cut and what the tests of a
    file share is made once; one that is done takes over the end of another's stretch."""
    from xdist.scheduler import WorkStealingScheduling

    if config.getvalue("dist") != "load":
        return None  # the user's own choice
    return WorkStealingScheduling(config, log)


LONGEST = (
    "test_the_check_for_a_gpu_runs_in_small_and_does_only_what_is_missing",
    "test_killed_at_random_moments", "test_many_runs_of_two_ranks_end_cleanly",
    "test_killed_20_times", "test_100_mb_take_no_more_memory_than_25",
    "test_the_script_for_slurm_starts_stops_and_goes_on",
    "test_a_compiled_run_under_fsdp_has_the_eager_gradients_also_after_a_resume",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Spread the longest tests evenly, since each process begins with a stretch of its own."""
    longest = [item for item in items if getattr(item, "originalname", "") in LONGEST]
    others = [item for item in items if item not in longest]
    for i, item in enumerate(longest):
        others.insert(i * len(items) // len(longest), item)
    items[:] = others


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Make a test's captured output fit for being sent to the process that reports it."""
    report = yield
    report.sections = [
        (name, content.encode(errors="backslashreplace").decode())
        for name, content in report.sections
    ]
    return report


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Sentences with structure to learn; random tokens would hide lost state."""
    path = tmp_path_factory.mktemp("text") / "story.txt"
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "saw",
        "one",
        "bird",
        "near",
        "that",
        "tree",
        "while",
        "rain",
        "fell",
    ]
    lines = []
    for i in range(2500):
        lines.append(" ".join(words[(i * k + k) % len(words)] for k in range(1, 9)) + ".\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def shards(text, tmp_path_factory):
    """A prepared data directory of byte tokens."""
    from nanonormuon.text.prepare import prepare

    out = tmp_path_factory.mktemp("data") / "story"
    prepare([text], out, "byte", 0.1)
    return out


@pytest.fixture(scope="session")
def tiny(shards):
    """Arguments of a run of eight steps that takes a second."""
    return [*TINY, f"data.path={shards}"]


@pytest.fixture(scope="session")
def bpe_data(text, tmp_path_factory):
    """The same text in 300 tokens, which a model's vocabulary pads to 320 rows."""
    from nanonormuon.text.prepare import prepare

    out = tmp_path_factory.mktemp("data") / "words"
    prepare([text], out, "bpe:300", 0.1)
    return out


@pytest.fixture(scope="session")
def trained(bpe_data, tmp_path_factory):
    """The directory of a finished run of Qwen3 that has learnt the text; for tests that only read
    it."""
    from nanonormuon.config import load
    from nanonormuon.train import train

    out = tmp_path_factory.mktemp("trained") / "run"
    settings = ["train.steps=60", "train.batch_tokens=512", "train.eval_every=20"]
    settings += ["model.value_embed=false", "model.bigram_embed=0"]
    settings += ["train.save_every=20", "train.log_every=5", f"data.path={bpe_data}"]
    settings += ["data.val_tokens=0"]  # all of them
    train(load([*TINY, "optim.momentum_warmup=30", *settings])[0], out)
    return out


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("needs fork()")
    forks = Forks(tmp_path_factory.mktemp("said"))
    yield forks
    forks.close()

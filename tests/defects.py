"""Deliberate defects: a piece of the source replaced, so that one can see which test notices.

DEFECT=NAME pytest TEST fails for every pair below; test_defects.py runs them all.
"""

import importlib
import inspect
import os
import textwrap

STOP = "tests/test_train.py::test_stopped_at_any_step_and_resumed_it_ends_in_the_same_bytes[4]"
ORDER = "tests/storage/test_checkpoint.py::test_the_order_of_a_save"

# name: (module, function, what it says, what it says then, the test that notices)
DEFECTS = {
    "no fsync": ("storage.files", "settle", "os.fsync(file.fileno())", "pass", ORDER),
    "directory not synced": (
        "storage.files", "publish", "sync_directory(target.parent)", "pass", ORDER),
    "published before it is complete": (
        "storage.files", "publish", 'f".partial-{target.name}"', "target.name", ORDER),
    "one buffer skipped": (
        "checkpoint", "named_state", "sorted(optimizer.state[p].items())",
        'sorted(optimizer.state[p].items()) if key != "second_moment"', STOP),
    "another data order after a resume": (
        "train", "Trainer.take_up", "self.seconds =",
        "self.batches.seed += 1\n    self.seconds =", STOP),
    "position off by one": (
        "train", "Trainer.take_up", '= state["step"]\n', '= state["step"] + 1\n', STOP),
    "best loss and spikes forgotten": (
        "train", "Trainer.take_up", '**state.get("spikes", {})', "",
        "tests/test_train.py::test_what_counts_as_a_spike_is_part_of_the_state"),
    "swallowed ENOSPC": (
        "checkpoint", "Saver.save", "finally:", "except OSError:",
        "tests/test_train.py::test_a_failed_save_is_never_silent"),
    "raised on the first rank alone": (
        "checkpoint", "Saver.save", "distributed.first_does(write)",
        "write() if first else None",
        "tests/runtime/test_faults.py::test_a_failed_save_ends_all_ranks_alike"),
    "retention by string": (
        "storage.checkpoints", "all_steps", "step_of(p) or 0", "p.name",
        "tests/storage/test_checkpoint.py::test_retention_counts_steps"),
    "digests not compared": (
        "storage.checkpoints", "verify", '"sha256": digest.hexdigest()}) != entry', '}) is entry',
        "tests/storage/test_checkpoint.py::test_every_corruption_of_every_file_is_named[model.safetensors-flip]"),
    "no verdict on the weights": (
        "runtime.health", "judge", '"gradient"), flags)', '"gradient"), (0, *flags[1:]))',
        "tests/runtime/test_faults.py::test_a_nan_on_one_rank_stops_all_before_the_update[weight-ddp]"),
    "signals forgotten in a save": (
        "train", "Trainer.follow_up", 'if due & {"save", "evaluate"}:', "if False:",
        "tests/runtime/test_faults.py::test_a_signal_in_any_part_of_a_run[term@write:2-143-2-1]"),
    "row after its checkpoint": (
        "train", "Trainer.follow_up", "self.run.record(self.row)", "pass",
        "tests/runtime/test_faults.py::test_killed_around_a_save"),
}  # fmt: skip


def apply() -> None:
    """Put the defect that DEFECT names into its module, before anything else imports from it."""
    if not (name := os.environ.get("DEFECT")):
        return
    module, path, old, new, _ = DEFECTS[name]
    module = importlib.import_module(f"nanonormuon.{module}")
    *owner, function = path.split(".")
    owner = getattr(module, owner[0]) if owner else module
    source = inspect.getsource(getattr(owner, function))
    assert old in source, f"{name}: {old!r} is no longer in {path}"
    found = module.__dict__.get(function)
    exec(textwrap.dedent(source).replace(old, new), module.__dict__)
    if owner is not module:
        setattr(owner, function, module.__dict__.pop(function))
        if found is not None:
            setattr(module, function, found)

"""One run in memory: made from a configuration, filled from a checkpoint, published as one."""

import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from nanonormuon import build as plan
from nanonormuon import checkpoint as snapshot
from nanonormuon import evaluate, optim
from nanonormuon.config import Config, to_toml
from nanonormuon.data import Ahead, Batches, validation_targets
from nanonormuon.engine import Canonical
from nanonormuon.errors import ConfigError
from nanonormuon.model import GPT
from nanonormuon.runtime import distributed, health, memory, trackers
from nanonormuon.runtime.faults import Watch
from nanonormuon.storage import checkpoints as checkpoint
from nanonormuon.storage import huggingface as hf
from nanonormuon.storage.run import RunDirectory, aligned, environment

log = logging.getLogger(__name__)


class RunState:
    """Data, model, optimizers, and how far the run is. train.Trainer adds the steps."""

    def __init__(self, config: Config, run: RunDirectory, world: distributed.World, watch: Watch):
        self.began = time.perf_counter()
        self.run, self.world, self.watch = run, world, watch
        self.data, self.tokenizer = plan.open_corpus(config, world)
        self.config = config = plan.complete(config, self.data)
        T, val_tokens = config.data.seq_len, config.data.val_tokens

        self.per_rank = plan.split_batch(config, world.size)
        self.first_sequence = self.per_rank * world.rank
        self.batches = Batches(
            self.data.train, T, self.per_rank * world.size, config.train.seed, config.data.order,
            self.data.mix,
        )  # fmt: skip
        self.ahead = Ahead(self.batches, pin=world.device.type == "cuda")
        self.targets = validation_targets(self.data.val, val_tokens)
        self.text_bytes = None if val_tokens else self.data.val.bytes
        if self.text_bytes is None and self.tokenizer is not None:
            lengths = self.tokenizer.token_lengths()
            self.text_bytes = evaluate.count_bytes(self.data.val, lengths, val_tokens)

        self.dtype = distributed.compute_dtype(config.train.dtype, world.device)
        self.gpt = GPT(config.model, self.dtype).init_weights(config.train.seed).to(world.device)
        self.gpt.separator = plan.separator(config, self.data, self.tokenizer)
        if config.train.activation_checkpointing:
            distributed.checkpoint_activations(self.gpt)
        self.parallel = "ddp" if config.train.parallel == "auto" else config.train.parallel
        canonical, self.model = config.train.canonical, self.gpt
        if not (canonical and self.parallel == "ddp"):
            dtype = None if canonical else self.dtype
            self.model = distributed.wrap(self.gpt, self.parallel, dtype, config.train.reshard)
        make = partial(optim.make_optimizers, settings=config.optim, ns_dtype=self.dtype)
        try:
            self.canonical = Canonical(self.gpt, make, world.size) if canonical else None
            self.optimizers = self.canonical.optimizers if self.canonical else make(self.gpt)
        except ValueError as error:
            raise ConfigError(f"optim: {error}") from None
        self.schedule = optim.Schedule(config.train.steps, config.optim)

        self.step = self.saved = 0  # optimizer steps done, and at the last checkpoint
        self.seconds = self.earlier_seconds = 0.0  # of training; of earlier processes in all
        self.validations: dict[int, dict[str, float | None]] = {}  # by step
        self.spikes = health.Spikes(config.train.skip_spikes)
        self.moved: Tensor | None = None  # by the last step that is logged; see measures.py

    def begin(self, resume: bool) -> None:
        """Take up where an interrupted run left off, open the logs, compile."""
        found = plan.where_to_resume(self.run.checkpoints, self.world) if resume else None
        if resume and not found:
            plan.refuse_other_settings(self.run.path / "config.toml", self.config)
        self.micro_batch = self.choose_micro_batch(found[1] if found else None)
        if found:
            self.load(*found)
        elif source := self.config.train.init_from:
            plan.begin_with(Path(source), self.gpt, self.config, self.tokenizer, self.world)
        described = environment(self.world.device, self.world.size)

        def open_run() -> list[dict[str, Any]]:
            size = snapshot.size_of(self.gpt, self.optimizers)
            checkpoint.check_space(self.run.checkpoints, size, self.config.train.keep_last)
            rows = self.run.open(to_toml(self.config), described, self.step)
            settings = asdict(self.config)
            self.run.sink = trackers.start(self.config.train.track, self.run.path, settings)
            return rows

        for row in distributed.first_does(open_run, self.world.device):
            if "val_loss" in row:
                self.validations[row["step"]] = {k: row[k] for k in ("val_loss", "val_bpb")}
        self.run.write("groups.txt", aligned(optim.group_rows(self.optimizers)) + "\n")
        if self.world.first:
            for line in plan.introduction(
                self.config, self.data, self.batches, self.gpt, self.micro_batch, self.world
            ):
                log.info(line)
            log.info(aligned(optim.group_rows(self.optimizers, fold=True)))
            log.info(f"writing to {self.run.path}")
            if resume:
                log.info(f"resumed from {found[0] if found else 'the start: nothing was saved'}")

        def trial(forward: Callable[..., Tensor]) -> None:
            forward(*self.batch(self.step, 0)).backward()

        wish, device = self.config.train.compile, self.world.device
        flops = plan.work(self.config, self.gpt)
        with self.watch.section("compilation"):
            self.forward, self.compile_seconds = plan.compiled(
                self.model, wish, flops, trial, device
            )
        if self.compile_seconds and self.world.first:
            log.info("compiled in %.0f s", self.compile_seconds)

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Become the run that a verified checkpoint describes, if it is this one."""
        plan.refuse_other_run(self.config, state, self.data, self.tokenizer)
        steps, before = self.config.train.steps, state["config"]["train"]["steps"]
        if state["step"] > (last := self.config.train.last_step):
            name = "steps" if last == steps else "stop_at"
            raise ConfigError(f"train.{name} = {last}: {path} is at step {state['step']} already")
        if steps != before and self.world.first:
            log.warning(f"train.steps: {before} -> {steps}; the schedule of the rest follows it")
        snapshot.load_weights(self.gpt, path)
        snapshot.load_optimizers(self.optimizers, path)
        self.step = self.saved = self.watch.step = state["step"]
        self.seconds, self.earlier_seconds = state["seconds"], state["total_seconds"]
        self.spikes = health.Spikes(self.config.train.skip_spikes, **state.get("spikes", {}))

    def choose_micro_batch(self, state: dict[str, Any] | None) -> int:
        """Sequences per device at a time: the same on every rank, and a divisor of per_rank."""
        wish = self.config.train.micro_batch
        if wish != "auto":
            return wish
        if state and state["ranks"] == self.world.size:
            return state["micro_batch"]  # for the same roundings, also on a device with less room
        with self.watch.section("start"):
            return memory.micro_batch(
                self.gpt,
                self.optimizers,
                self.config.data.seq_len,
                self.per_rank,
                self.world,
                self.parallel,
                self.config.train.activation_checkpointing,
            )

    # ---------------------------------------------------------------------------------------------
    # How far it is

    @property
    def tokens(self) -> int:
        return self.step * self.config.train.batch_tokens

    @property
    def total_seconds(self) -> float:
        """Of this process and those before it."""
        return self.earlier_seconds + time.perf_counter() - self.began

    @property
    def last_validation(self) -> dict[str, float | None]:
        return self.validations.get(self.step, {})

    @property
    def best(self) -> int | None:
        """The step with the lowest validation loss so far."""
        return self.lowest(self.validations)

    @property
    def best_kept(self) -> Path | None:
        """Of the checkpoints there are, the one with the lowest validation loss."""
        kept = {checkpoint.step_of(p): p for p in checkpoint.all_steps(self.run.checkpoints)}
        return kept.get(self.lowest(kept.keys() & self.validations.keys()))

    def lowest(self, steps: Iterable[int]) -> int | None:
        losses = {step: self.validations[step]["val_loss"] for step in steps}
        return min(losses, key=lambda step: (losses[step], -step), default=None)

    @property
    def stale(self) -> int:
        """Evaluations since the best one."""
        return sum(step > (self.best or 0) for step in self.validations)

    @property
    def exhausted(self) -> bool:
        """Whether train.patience is at its end."""
        return 0 < self.config.train.patience <= self.stale

    # ---------------------------------------------------------------------------------------------
    # To a checkpoint

    def save(self, retain: bool = True) -> None:
        """Publish a checkpoint of this step, unless there is one, and delete what is not to be
        kept; every rank takes part. Raises NonFinite or Diverged rather than save what is amiss."""
        if self.saved == self.step:
            return
        with self.watch.section("save"):
            self.batches.split.settle()  # nothing is kept that came of a damaged shard
            folder, world = self.run.checkpoints, self.world
            weights, buffers = snapshot.named_state(self.gpt, self.optimizers)
            health.check_state(weights | buffers, self.step, world)
            snapshot.save(folder, self.step, weights, buffers, self.description, world)
            if retain:
                distributed.first_does(self.retain, world.device)
            self.saved = self.step

    def description(self) -> dict[str, bytes]:
        """What a checkpoint says beside its tensors: its files by name."""
        tokenizer, config, spikes = self.tokenizer, self.config, asdict(self.spikes)
        spikes.pop("factor")
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "total_seconds": self.total_seconds,
            "ranks": self.world.size,
            "micro_batch": self.micro_batch,
            "spikes": spikes,
            "config": asdict(config),
            "data": self.data.fingerprint,
            "tokenizer": tokenizer and tokenizer.hash,
        }
        describes = hf.config_json(config.model, config.data.seq_len, tokenizer and tokenizer.eot)
        return {
            "config.json": as_json(describes),
            "state.json": as_json(state),
            **(tokenizer.files() if tokenizer else {}),
        }

    def retain(self) -> None:
        keep, best = self.config.train, self.best_kept
        best = checkpoint.step_of(best) if keep.keep_best and best else None
        checkpoint.retain(self.run.checkpoints, keep.keep_last, self.step, keep.keep_every, best)


def as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()

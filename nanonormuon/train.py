"""The run: the file to open first. `Trainer.take_step` is one training step.

A run is a function of its configuration and its data. The batch of step k is arithmetic, the
learning rate of step k is arithmetic, and the random generators are seeded anew from (seed, step,
rank), so a resumed run needs nothing but weights, optimizer buffers and k.
"""

import contextlib
import json
import logging
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanonormuon import build, checkpoint, evaluate, optim
from nanonormuon.config import Config, flat
from nanonormuon.data import Batches, Loader
from nanonormuon.errors import Interrupted, OutOfMemory
from nanonormuon.optim import Schedule, group_rows
from nanonormuon.runtime import distributed, health, memory
from nanonormuon.runtime.faults import Stopping, Watch
from nanonormuon.runtime.health import BadStep, Spikes, Verdict, WeightStats, judge
from nanonormuon.runtime.memory import MicroBatch
from nanonormuon.storage import checkpoints, huggingface
from nanonormuon.storage.files import progress
from nanonormuon.storage.run import RunDirectory, Validations, aligned, announce, environment
from nanonormuon.storage.values import to_toml
from nanonormuon.text.corpus import compressors, open_corpus

log = logging.getLogger(__name__)


def train(
    config: Config, out: Path, resume: bool = False, stopping: Stopping | None = None
) -> dict[str, Any]:
    """Train as configured, leaving everything in `out`; returns what summary.json says.

    Raises ConfigError, DataError, CheckpointError, RunError, NonFinite, OutOfMemory or OSError with
    one line that says what to do, and Interrupted after a signal. stopping: handlers in place.
    """
    optim.check_trusted(config.optim.name)
    limit = config.train.time_limit
    watching = contextlib.nullcontext(stopping) if stopping else Stopping()
    with watching as stopping, Watch(limit, stopping) as watch:
        with watch.section("start"):
            world = distributed.start(config.train.device, watch.longest())
            # these three refuse before anything is made; a node may have its own copy of the data
            alike = {"--resume": resume, "builtin data": config.data.path.startswith("builtin:")}
            distributed.check_alike(flat(config, without=["data.path"]) | alike, world)
            distributed.check_nodes(config.train.parallel, world)
            build.split_batch(config, world.size)
            out = Path(distributed.from_first(str(out)))  # names carry the time
        with RunDirectory(out, world.first) as run:
            with watch.section("start"):
                distributed.first_does(lambda: run.acquire(resume))
                watch.folder = run.path / "errors"
                trainer = Trainer(config, run, world, watch, resume)
                trainer.begin()
            try:
                summary = trainer.loop()
            except BadStep as bad:
                from nanonormuon.runtime import crash  # hardly a run comes here

                state = checkpoint.named_state(trainer.engine.model, trainer.engine.optimizers)
                raise crash.report(bad, trainer, *state) from None
            except OutOfMemory as error:
                if error.everywhere and trainer.step:
                    trainer.save()
                raise
        with watch.section("end"):
            distributed.finish()
        return summary


class Trainer:
    """A run in memory: its parts, how far it is, and what it does."""

    def __init__(
        self, config: Config, run: RunDirectory, world: distributed.World, watch: Watch,
        resume: bool = False,
    ):  # fmt: skip
        self.began = time.perf_counter()
        self.run, self.world, self.watch, self.resume = run, world, watch, resume
        self.data, self.tokenizer = open_corpus(config, world)
        # without a tokenizer a rank would leave the samples to the others
        known = {"data": self.data.fingerprint, "tokenizer": self.tokenizer and self.tokenizer.hash}
        distributed.check_alike(known, world)
        self.config = config = build.complete(config, self.data)
        memory.refuse_absurd(config, world)
        self.text_bytes = self.data.val.text_bytes(self.tokenizer, config.data.val_tokens)
        self.per_rank = build.split_batch(config, world.size)
        self.batches = Batches(
            self.data.train, config.data.seq_len, self.per_rank * world.size, config.train.seed,
            config.data.order, self.data.mix,
        )  # fmt: skip
        self.found = checkpoint.newest(run.checkpoints, world) if resume else None
        if resume and not self.found:
            build.refuse_other_settings(run.path / "config.toml", config)
        state = self.found and self.found[1]
        self.engine, size = build.make_engine(config, self.tokenizer, world, self.per_rank, state)
        self.again = run.again(config.optim.name)
        self.memory = MicroBatch(size, self.per_rank, self.engine, watch, self.again)
        self.loader = Loader(self.batches, world, self.engine.dealt)
        self.schedule = Schedule(config.train.steps, config.optim)
        self.spikes = Spikes(config.train.skip_spikes)
        self.weight_stats = WeightStats(self.engine.optimizers, world.device)
        wish, gpu = config.train.save_async, world.device.type == "cuda"
        background = wish == "on" or (wish == "auto" and gpu)
        self.saver = checkpoint.Saver(run.checkpoints, world, watch.stopping, background)
        run.resources.callback(self.saver.thread.shutdown)  # waits, also after an error
        self.validations = Validations()

        self.last_step = config.train.last_step
        self.step = self.saved = 0  # optimizer steps done, and at the last checkpoint
        self.seconds = 0.0  # of training, without evaluations and saves

    def begin(self) -> None:
        """Load the checkpoint to resume from, if any; open the logs; compile."""
        config, engine, run = self.config, self.engine, self.run
        if self.found:
            build.load_checkpoint(*self.found, config, self.data, self.tokenizer, engine)
            self.take_up(self.found[1])
        elif config.train.init_from:
            build.begin_with(config, engine, self.tokenizer)
        rows, sampled = distributed.first_does(self.open_logs)
        self.validations.take_up(rows)
        self.sampled = set(map(tuple, sampled))  # (step, prompt)
        self.row = {"step": self.step, "tokens": self.tokens}  # the latest of metrics.jsonl
        run.write("groups.txt", aligned(group_rows(engine.optimizers)) + "\n")
        for line in build.introduction(config, self.data, self.batches, engine, self.memory.size):
            log.info(line)
        log.info(f"writing to {run.path}")
        if self.resume:
            where = self.found[0] if self.found else "the start: nothing was saved"
            log.info(f"resumed from {where}")
        with self.watch.section("compilation"):
            self.compile_seconds = self.memory.retry(self.compile)

    def compile(self) -> float:
        """Compile the engine on the first micro-batch of the next step; returns the seconds."""
        micro_batches = self.loader.micro_batches(self.step, self.memory.size)
        return build.compile_engine(self.config, self.engine, lambda: next(micro_batches))

    def take_up(self, state: dict[str, Any]) -> None:
        """Restore the run's progress from a checkpoint's state.json."""
        self.step = self.saved = self.watch.step = state["step"]
        self.seconds = state["seconds"]
        self.began -= state["total_seconds"]
        self.spikes = Spikes(self.config.train.skip_spikes, **state.get("spikes", {}))

    def open_logs(self) -> tuple[list[dict], list[tuple[int, str]]]:
        """On rank 0, check the room on the disk and open the logs, as RunDirectory.open does."""
        settings = self.config.train
        size = checkpoint.size_of(self.engine.model, self.engine.optimizers)
        every, last = settings.save_every or self.last_step, self.last_step
        saves = -(-last // every) - self.step // every if self.step < last else 0
        checkpoints.check_space(self.run.checkpoints, size, settings.keep_last, saves)
        described = environment(self.world.device, self.world.size, self.config.optim.name)
        found = self.run.open(to_toml(asdict(self.config)), described, self.step)
        if settings.track:
            from nanonormuon.runtime import trackers  # few runs have one

            self.run.sink = trackers.start(settings.track, self.run.path, asdict(self.config))
        return found

    # --------------------------------------------------------------------------------------- A step

    def take_step(self) -> tuple[Tensor, Verdict]:
        """One optimizer step. Returns this rank's mean loss, a 0-d tensor, and what all ranks found
        before the update. Raises BadStep on every rank before an update that would spread NaN."""
        self.schedule.set(self.engine.optimizers, self.step)
        loss = self.memory.retry(self.accumulate)
        verdict = judge(loss, self.engine, self.spikes, self.watch.stopping)
        if not verdict.skip:
            self.engine.clip(verdict.grad_norm)
            with self.weight_stats.around("row" in self.due(self.step + 1, verdict.stop)):
                self.engine.update()
        self.engine.zero_grad()
        self.step = self.watch.step = self.step + 1
        return loss, verdict

    def accumulate(self) -> Tensor:
        """Accumulate the gradients of one step; returns this rank's mean loss, a 0-d tensor."""
        seed = (self.config.train.seed * 1_000_003 + self.step) * 65_537 + self.world.rank
        torch.manual_seed(seed % (1 << 63))  # nothing random is carried from step to step
        micro_batches = self.loader.micro_batches(self.step, self.memory.size)
        return self.engine.accumulate(micro_batches, self.memory.count)

    def due(self, step: int, stop: int = 0) -> set[str]:
        """What follows `step`: "row" (in metrics.jsonl), "save", "evaluate", "sample", or nothing.
        stop: the signal that any rank has received; 0: none."""
        t = self.config.train
        if stop:
            return {"row", "save"}
        found = {"save", "evaluate"} if step == self.last_step else set()
        every = {"row": t.log_every, "save": t.save_every, "evaluate": t.eval_every}
        every["sample"] = t.sample_every
        found |= {what for what, steps in every.items() if steps and step % steps == 0}
        return found | {"row"} if found else found

    # ------------------------------------------------------------------------------------- The loop

    def loop(self) -> dict[str, Any]:
        """Take every step and do what follows it; returns the content of summary.json."""
        self.catch_up()
        # log lines take the bar's place where standard error is not a terminal
        self.bar = progress("training", self.last_step, "step", initial=self.step)
        self.logged, self.tick = (self.step, self.seconds), time.perf_counter()
        self.watch.stopping.finish_steps()
        while self.step < self.last_step and not self.exhausted:
            with self.watch.section("step"):
                loss, verdict = self.take_step()
            self.bar.update()
            for name, epoch in self.batches.begun(self.step - 1):
                log.info(f"epoch {epoch} of {name} begins in step {self.step}")
            if due := self.due(self.step, verdict.stop):
                self.follow_up(due, loss, verdict)
        self.bar.close()
        self.save()
        if self.exhausted:
            best, stale = self.validations.best(), self.validations.stale
            log.info(f"no lower val_loss than step {best}'s in {stale} evaluations: done")
        self.show_samples()
        return self.summarise()

    def catch_up(self) -> None:
        """Do what precedes the first step. On resume, evaluate and sample if an earlier process was
        cut off between this step's checkpoint and these."""
        due, fresh = self.due(self.step), self.step == 0
        # a fine-tuned model's first loss is what training begins with
        evaluate = self.config.train.init_from if fresh else "evaluate" in due
        if evaluate and self.step not in self.validations:
            self.validate()
            if fresh:
                log.info("before training  val_loss {val_loss:.4f}".format(**self.row))
        if fresh or "sample" in due:
            self.show_samples()

    def follow_up(self, due: set[str], loss: Tensor, verdict: Verdict) -> None:
        """Do what follows a step: write the row, save, evaluate, stop if asked to, sample.

        A checkpoint never appears before the rows up to its step. If this process ends after it, a
        resumed one does the rest (`catch_up`).
        """
        self.row, stop = self.measure(loss, verdict.grad_norm), verdict.stop
        self.run.record(self.row)
        if "save" in due:
            self.save(wait=False)
        if "evaluate" in due:
            with contextlib.suppress(Interrupted):
                self.validate()
        if due & {"save", "evaluate"}:  # both take time, in which a signal may have come
            stop = self.agree()
        announce(self.row, self.config.train.steps, self.bar)
        if stop:
            self.bar.close()
            self.save()
            saved = f"after step {self.step}, which is saved"
            raise Interrupted(stop, f"{saved}; go on with: {self.again}")
        if "sample" in due:
            self.show_samples()
        self.tick = time.perf_counter()

    def measure(self, loss: Tensor, grad_norm: float) -> dict[str, Any]:
        """A row of metrics.jsonl for the step just taken."""
        mean_loss = float(distributed.total(loss) / self.world.size)
        self.seconds += time.perf_counter() - self.tick
        since, seconds = self.logged
        rate = (self.step - since) * self.config.train.batch_tokens / (self.seconds - seconds)
        self.logged = (self.step, self.seconds)
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "loss": mean_loss,
            "lr": self.config.optim.lr * self.schedule.lr(self.step - 1),
            "grad_norm": grad_norm,
            **self.weight_stats.row(),
            "tokens_per_second": round(rate, 1),
            **({"skipped": self.spikes.skipped} if self.spikes.factor else {}),
            **{key: x for extra in self.engine.extras for key, x in extra.row().items()},
        }

    def validate(self) -> None:
        """Measure the loss on the whole validation split, equal on every rank, and add it to the
        step's row. Raises Interrupted if a rank receives a signal meanwhile."""
        data, T = self.config.data, self.config.data.seq_len
        # in training all layers' activations are kept, here one layer's
        size = self.memory.size
        at_once = max(size, min(8192 // T, size * self.config.model.n_layer))

        def forward(*batch: Tensor, **more: Any) -> Tensor:
            if number := self.agree():
                raise Interrupted(number, "in the evaluation")
            return self.engine.evaluate(*batch, **more)

        with self.watch.section("evaluation"):
            loss, targets = evaluate.validation_loss(
                forward, self.data.val, T, at_once, self.world, data.val_tokens
            )
        bpb = evaluate.bits_per_byte(loss, targets, self.text_bytes)
        self.validations[self.step] = found = {"val_loss": loss, "val_bpb": bpb}
        self.run.record(self.row, found)
        self.row |= found

    def agree(self) -> int:
        """The signal that any rank has received, on all of them."""
        return int(distributed.largest([self.watch.stopping.number])[0])

    def show_samples(self) -> None:
        """Continue each prompt; every rank takes part, since sharded layers run in step."""
        settings, model = self.config.train, self.engine.model
        if self.tokenizer is None or not settings.sample_tokens:
            return
        from nanonormuon import sample  # not part of every run

        size = {"max_tokens": settings.sample_tokens, "context": self.config.data.seq_len}
        for seed, prompt in enumerate(sample.prompts(settings.sample_prompt)):
            if (self.step, prompt) in self.sampled:
                continue
            self.sampled.add((self.step, prompt))
            with self.watch.section("sample"):
                rows = [sample.Text(self.tokenizer)]
                pieces = sample.write(model, rows, prompt, seed=seed, **size)
                text = "".join(piece for (piece,) in pieces)
            self.run.append("samples.jsonl", step=self.step, prompt=prompt, text=text)
            lines = "\n".join(f"  | {line}" for line in (prompt + text).splitlines())
            shown_later = self.step in (0, self.last_step) or self.exhausted  # by the command line
            level = logging.DEBUG if shown_later else logging.INFO
            log.log(level, "sample after step %d:\n%s", self.step, lines)

    # --------------------------------------------------------------------------- How far the run is

    @property
    def tokens(self) -> int:
        return self.step * self.config.train.batch_tokens

    @property
    def total_seconds(self) -> float:
        """Seconds of this process and earlier ones of the run."""
        return time.perf_counter() - self.began

    @property
    def exhausted(self) -> bool:
        """Whether train.patience has run out."""
        return 0 < self.config.train.patience <= self.validations.stale

    @property
    def kept(self) -> set[int | None]:
        """The steps of the checkpoints on disk."""
        return {checkpoints.step_of(p) for p in checkpoints.all_steps(self.run.checkpoints)}

    def save(self, retain: bool = True, wait: bool = True) -> None:
        """Publish a checkpoint of this step, unless there is one, and, if `retain`, delete those
        that need not be kept; every rank takes part. Raises NonFinite or Diverged rather than save
        bad state. wait: return only once it is on disk, even if it is written in the background.
        """
        with self.watch.section("save"):
            self.saver.settle()
            if self.saved != self.step:
                self.batches.split.settle()  # keep nothing that a damaged shard led to
                self.run.settle()
                weights, buffers = checkpoint.named_state(self.engine.model, self.engine.optimizers)
                health.check_state(weights | buffers, self.step, self.world)
                keep, folder = self.config.train, self.run.checkpoints
                best = self.validations.best({*self.kept, self.step}) if keep.keep_best else None
                last = keep.keep_last if retain else 0
                clear = partial(checkpoints.retain, folder, last, self.step, keep.keep_every, best)
                self.saver.save(self.step, weights, buffers, self.description, clear)
                self.saved = self.step
            if wait:
                self.saver.settle()

    def description(self) -> dict[str, bytes]:
        """A checkpoint's files beside its tensors, by name."""
        spikes = asdict(self.spikes)
        spikes.pop("factor")
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "total_seconds": self.total_seconds,
            "ranks": self.world.size,
            "micro_batch": self.memory.size,
            "spikes": spikes,
            "data": self.data.fingerprint,
        }
        return checkpoint.describe(self.config, state, self.tokenizer)

    def summarise(self) -> dict[str, Any]:
        """Write summary.json at the last step or stop_at; returns its content."""
        best, kept = self.validations.best(), self.validations.best(self.kept)
        shown = self.world.first and self.config.train.sample_tokens  # to somebody, not to a race
        summary = {
            "steps": self.step,
            "tokens": self.tokens,
            **self.validations.get(self.step, {}),
            "best_step": best,
            "best_val_loss": None if best is None else self.validations[best]["val_loss"],
            "train_seconds": round(self.seconds, 3),
            "compile_seconds": round(self.compile_seconds, 3),
            "total_seconds": round(self.total_seconds, 3),
            **(compressors(self.config, self.data, self.tokenizer) if shown else {}),
            "tokens_per_second": round(self.tokens / self.seconds, 1) if self.seconds else None,
            "peak_memory": distributed.peak_memory(self.world.device),
            "checkpoint": f"checkpoints/step-{self.step:06d}",
            "best_checkpoint": None if kept is None else f"checkpoints/step-{kept:06d}",
            "hugging_face": not huggingface.obstacles(self.config.model),
            "own_source": huggingface.carried(self.config.model),
        }
        self.run.rewrite("metrics.jsonl", self.step)  # one line per step
        self.run.write("summary.json", json.dumps(summary, indent=1) + "\n")
        return summary

"""The run: the file to open first. `Trainer.take_step` is one training step.

A run is a function of its configuration and its data. The batch of step k is arithmetic, the
learning rate of step k is arithmetic, and the random generators are seeded anew from (seed, step,
rank), so a resumed run needs nothing but weights, optimizer buffers and k.
"""

import contextlib
import json
import logging
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from nanonormuon import build as plan
from nanonormuon import checkpoint as snapshot
from nanonormuon import errors, evaluate, sample
from nanonormuon.config import Config
from nanonormuon.errors import ConfigError, Interrupted, out_of_memory
from nanonormuon.runtime import distributed, health, measures, memory
from nanonormuon.runtime.faults import Stopping, Watch
from nanonormuon.state import RunState
from nanonormuon.storage import huggingface as hf
from nanonormuon.storage.run import RunDirectory, announce

log = logging.getLogger(__name__)


def train(
    config: Config, out: Path, resume: bool = False, stopping: Stopping | None = None
) -> dict[str, Any]:
    """Train as configured, leaving everything in `out`; returns what summary.json says.

    Raises ConfigError, DataError, CheckpointError, RunError, NonFinite or OSError with one line
    that says what to do, and Interrupted after a signal, which `stopping` has watched for so far.
    """
    limit = config.train.time_limit
    watching = contextlib.nullcontext(stopping) if stopping else Stopping()
    with watching as stopping, Watch(limit, stopping) as watch:
        with watch.section("start"):
            try:
                world = distributed.start(config.train.device, watch.longest())
            except ValueError as error:
                raise ConfigError(str(error)) from None
            plan.split_batch(config, world.size)  # refuses before anything is made
            out = Path(distributed.from_first(str(out), world.device))  # names carry the time
        with RunDirectory(out, world.first) as run:
            with watch.section("start"):
                distributed.first_does(lambda: run.acquire(resume), world.device)
                watch.folder = run.path / "errors"
                trainer = Trainer(config, run, world, watch)
                trainer.begin(resume)
            summary = trainer.loop()
        with watch.section("end"):
            distributed.finish()
        return summary


class Trainer(RunState):
    """A run in memory (state.py) and what it does: steps, and what comes between them."""

    def batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """This rank's micro-batch: tokens and targets, each (micro_batch, seq_len) int64."""
        n = self.micro_batch
        first, stride = self.first_sequence, n
        if self.canonical:  # dealt out in turn
            first, stride = self.world.rank * n, self.world.size * n
        i = first + micro * stride
        then = (step, i + stride, i + stride + n)
        if micro + 1 == self.per_rank // n:
            then = (step + 1, first, first + n)
        with self.watch.section("data"):
            tokens, targets = self.ahead.batch((step, i, i + n), then)
        device = self.world.device
        return tokens.to(device, non_blocking=True), targets.to(device, non_blocking=True)

    def take_step(self) -> tuple[Tensor, health.Verdict]:
        """One optimizer step. Returns this rank's mean loss, a 0-d tensor, and what all ranks found
        before the update: the gradient's norm, and the signal that any of them has had."""
        self.schedule.set(self.optimizers, self.step)
        loss = self.gradients()
        grad_norm = health.norm(p.grad for p in self.gpt.parameters())
        weights, buffers = snapshot.named_state(self.gpt, self.optimizers)
        state = (*weights.values(), *buffers.values())
        verdict = health.judge(loss, grad_norm, state, self.watch.stopping.number, self.world)
        skip = verdict.amiss != "state" and self.spikes.skip(verdict.grad_norm)
        if verdict.amiss and not skip:  # on any rank: all of them stop before the update
            self.refuse(verdict, loss)
        if limit := self.config.optim.grad_clip:
            grads = [p.grad for p in self.gpt.parameters() if p.grad is not None]
            torch._foreach_mul_(grads, (limit / grad_norm).clamp(max=1.0))
        before = None
        if verdict.stop or self.logged(self.step + 1):
            before = measures.copies(self.optimizers)
        if self.canonical:
            self.canonical.update(skip)
        else:
            for optimizer in self.optimizers:
                if not skip:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        if before is not None:
            self.moved = measures.moved(self.optimizers, before)
        self.step = self.watch.step = self.step + 1
        return loss, verdict

    def gradients(self) -> Tensor:
        """The step's gradients; returns this rank's mean loss, a 0-d tensor. When memory runs out
        the micro-batches are halved: the batch, and so the curve, stays what it is."""
        while True:
            try:
                return self.accumulate()
            except Exception as error:
                if not out_of_memory(error):
                    raise
                on_all = self.world.size == 1 or isinstance(error, memory.Shortage)
                cause = str(error)
            self.gpt.zero_grad(set_to_none=True)
            memory.free_cache(self.world.device)
            fewer = memory.smaller(self.micro_batch, self.per_rank)
            if not on_all or self.canonical or fewer == self.micro_batch:
                if on_all and self.step:
                    self.save()
                raise memory.exhausted(cause, self.run.path, self.micro_batch, fewer)
            if self.world.first:
                log.warning(
                    f"step {self.step}: out of memory with {self.micro_batch} sequences at a time; "
                    f"repeated, and from here on, with {fewer}; the batch stays as it is"
                )
            self.micro_batch = fewer

    def accumulate(self) -> Tensor:
        """One attempt at that. Up to the last backward pass no replica waits for another, and so
        all of them can hear of one that ran out of memory; after it they would wait for ever."""
        seed = (self.config.train.seed * 1_000_003 + self.step) * 65_537 + self.world.rank
        torch.manual_seed(seed % (1 << 63))  # nothing random is carried from step to step
        loss = torch.zeros((), device=self.world.device)
        count = self.per_rank // self.micro_batch
        in_step = self.canonical or self.parallel == "fsdp"

        def forward(micro: int) -> Tensor:
            return self.forward(*self.batch(self.step, micro)) / count

        def backward(part: Tensor) -> None:
            if self.canonical:
                (part / self.world.size).backward()
                self.canonical.add()
            else:
                part.backward()
            loss.add_(part.detach())

        def up_to_the_last() -> Tensor:
            for micro in range(count - 1):
                backward(forward(micro))
            return forward(count - 1)

        distributed.sync_gradients(self.model, False)
        last = memory.together(up_to_the_last, in_step)
        distributed.sync_gradients(self.model, not self.canonical)
        backward(last)
        if self.canonical:
            self.canonical.finish()
        return loss

    def loop(self) -> dict[str, Any]:
        """Steps, and what comes between them: save, then evaluate, then sample."""
        settings, speak = self.config.train, self.world.first
        last_step = settings.last_step
        if self.step == 0:
            self.show_sample("before training")
        elif due(self.step, settings.eval_every, last_step) and self.step not in self.validations:
            self.validate()  # the process ended between this step's checkpoint and its evaluation
            self.run.record({"step": self.step, "tokens": self.tokens, **self.last_validation})
        terminal = sys.stderr.isatty()
        bar = tqdm(
            total=last_step, initial=self.step, unit="step", disable=not (speak and terminal)
        )
        logged, tick = (self.step, self.seconds), time.perf_counter()
        self.watch.stopping.finish_steps()
        while self.step < last_step and not self.exhausted:
            with self.watch.section("step"):
                loss, verdict = self.take_step()
            bar.update()
            stopped = verdict.stop
            for name, epoch in self.batches.begun(self.step - 1) if speak else ():
                log.info(f"epoch {epoch} of {name} begins in step {self.step}")
            saving = bool(stopped) or due(self.step, settings.save_every, last_step)
            evaluating = not stopped and due(self.step, settings.eval_every, last_step)
            sampling = not stopped and due(self.step, settings.sample_every, 0)
            if not (stopped or self.logged(self.step)):
                continue
            row = self.measure(loss, verdict.grad_norm, *logged, tick)
            logged = (self.step, self.seconds)
            if saving:
                self.save()
            if evaluating:
                with contextlib.suppress(Interrupted):
                    row |= self.validate()
                if self.exhausted:
                    self.save()
            if saving or evaluating:  # both take time, in which a signal may have come
                stopped = self.agree()
            self.run.record(row)
            if speak:
                announce(row, settings.steps, bar, terminal)
            if stopped:
                bar.close()
                self.save()
                raise Interrupted(
                    stopped,
                    f"after step {self.step}, which is saved; go on with: "
                    f"normuon-train run --resume --out {shlex.quote(str(self.run.path))}",
                )
            if sampling and self.step < last_step:
                self.show_sample(f"after step {self.step}")
            tick = time.perf_counter()
        bar.close()
        if self.exhausted and speak:
            log.info(f"no lower val_loss than step {self.best}'s in {self.stale} evaluations: done")
        self.show_sample("after training")
        return self.summarise()

    # ---------------------------------------------------------------------------------------------
    # Between the steps

    def logged(self, step: int) -> bool:
        """Whether `step` has a row in metrics.jsonl, also without a signal to stop."""
        settings = self.config.train
        every = (settings.log_every, settings.save_every, settings.eval_every)
        return due(step, settings.sample_every, 0) or any(
            due(step, n, settings.last_step) for n in every
        )

    def measure(
        self, loss: Tensor, grad_norm: float, since: int, seconds: float, tick: float
    ) -> dict[str, Any]:
        """A row of metrics.jsonl for the step just taken."""
        mean_loss = float(distributed.total(loss) / self.world.size)
        self.seconds += time.perf_counter() - tick
        rate = (self.step - since) * self.config.train.batch_tokens / (self.seconds - seconds)
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "loss": mean_loss,
            "lr": self.config.optim.lr * self.schedule.lr(self.step - 1),
            "grad_norm": grad_norm,
            **measures.of_matrices(self.optimizers, self.moved, self.world.device),
            "tokens_per_second": round(rate, 1),
            **({"skipped": self.spikes.skipped} if self.spikes.factor else {}),
        }

    def validate(self) -> dict[str, float | None]:
        """The loss on the whole validation split, the same on every rank. Raises Interrupted if
        meanwhile a rank is signalled to stop."""
        forward = self.gpt if self.forward is self.model else self.forward
        T, n_layer = self.config.data.seq_len, self.config.model.n_layer
        # in training all layers' activations are kept, here one layer's
        at_once = max(self.micro_batch, min(8192 // T, self.micro_batch * n_layer))

        def step(*batch: Tensor, **more: Any) -> Tensor:
            if number := self.agree():
                raise Interrupted(number, "in the evaluation")
            return forward(*batch, **more)

        with self.watch.section("evaluation"):
            loss, targets = evaluate.validation_loss(
                step,
                self.data.val,
                T,
                at_once,
                self.world,
                self.config.data.val_tokens,
            )
        bpb = evaluate.bits_per_byte(loss, targets, self.text_bytes)
        self.validations[self.step] = {"val_loss": loss, "val_bpb": bpb}
        return self.last_validation

    def agree(self) -> int:
        """The signal that any rank has had, on all of them."""
        return int(distributed.largest([self.watch.stopping.number], self.world.device)[0])

    def show_sample(self, when: str) -> None:
        settings, tokenizer = self.config.train, self.tokenizer
        if tokenizer is None or not settings.sample_tokens:
            return
        prompt = settings.sample_prompt  # every rank takes part: sharded layers run in step
        context = self.config.data.seq_len
        with self.watch.section("sample"):
            text = "".join(
                sample.stream(self.gpt, tokenizer, prompt, settings.sample_tokens, context=context)
            )
        if self.world.first:
            lines = (prompt + text).splitlines()
            log.info("sample %s:\n%s", when, "\n".join(f"  | {line}" for line in lines))
            self.run.append("samples.jsonl", {"step": self.step, "prompt": prompt, "text": text})

    def summarise(self) -> dict[str, Any]:
        """Write summary.json: where the run stands, after its last step or stop_at."""
        best, kept = self.best, self.best_kept
        summary = {
            "steps": self.step,
            "tokens": self.tokens,
            **self.last_validation,
            "best_val_loss": None if best is None else self.validations[best]["val_loss"],
            "train_seconds": round(self.seconds, 3),
            "compile_seconds": round(self.compile_seconds, 3),
            "total_seconds": round(self.total_seconds, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 1) if self.seconds else None,
            "peak_memory": distributed.peak_memory(self.world.device),
            "checkpoint": f"checkpoints/step-{self.step:06d}",
            "best_checkpoint": f"checkpoints/{kept.name}" if kept else None,
            "hugging_face": not hf.obstacles(self.config.model),
        }
        self.run.write("summary.json", json.dumps(summary, indent=1) + "\n")
        return summary

    def refuse(self, verdict: health.Verdict, loss: Tensor) -> NoReturn:
        """Raise NonFinite on all ranks, after leaving a report on the step and, if it is sound, the
        state before it: as a checkpoint, from which a resumed run repeats this very step."""
        found = health.crash_report(verdict, loss, self.gpt, self.optimizers, self.world)
        windows = self.batches.windows(self.step).tolist()  # (shard, offset) per sequence
        seed, config = self.config.train.seed, asdict(self.config)
        report = {"step": self.step, **found, "seed": seed, "windows": windows, "config": config}
        self.run.write(f"crash-{self.step:06d}.json", json.dumps(report) + "\n")
        if verdict.amiss != "state" and self.step:
            self.save(retain=False)
        names = [name for name, _ in self.gpt.named_parameters()]
        message = health.explain(report, names, self.per_rank, self.saved, self.run.path)
        raise errors.NonFinite(message, follows=self.world.rank != verdict.rank)


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the last, happens after `step`."""
    return step == last or bool(every and step % every == 0)

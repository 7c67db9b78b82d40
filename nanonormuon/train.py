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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from nanonormuon import (
    checkpoint,
    distributed,
    evaluate,
    health,
    hf,
    optim,
    plan,
    sample,
    trackers,
)
from nanonormuon.canonical import Canonical
from nanonormuon.config import Config, ConfigError, to_toml
from nanonormuon.data import Ahead, Batches, validation_targets
from nanonormuon.faults import Interrupted, Stopping, Watch
from nanonormuon.log import RunDirectory, announce, environment
from nanonormuon.model import GPT

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


class Trainer:
    """One run in memory: data, model, optimizers, and how far it is."""

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
        self.micro_batch = plan.micro_batch(config, self.gpt, self.per_rank, world)
        parallel = "ddp" if config.train.parallel == "auto" else config.train.parallel
        self.model = self.gpt
        if not config.train.canonical:
            self.model = distributed.wrap(self.gpt, parallel, self.dtype, config.train.reshard)
        settings = asdict(config.optim)
        settings.pop("grad_clip")  # the loop's own; all others belong to one of these two, or fail
        shape = {k: settings.pop(k) for k in optim.Schedule.OWN}
        shape["momentum"] = settings["momentum"]
        self.optimizers = optim.make_optimizers(self.gpt, ns_dtype=self.dtype, **settings)
        self.canonical = None
        if config.train.canonical:
            self.canonical = Canonical(self.gpt, self.optimizers, world.size)
        self.schedule = optim.Schedule(config.train.steps, **shape)

        self.step = self.saved = 0  # optimizer steps done, and at the last checkpoint
        self.seconds = self.earlier_seconds = 0.0  # of training; of earlier processes in all
        self.validations: dict[int, dict[str, float | None]] = {}  # by step
        self.spikes = health.Spikes(config.train.skip_spikes)

    def begin(self, resume: bool) -> None:
        """Take up where an interrupted run left off, open the logs, compile."""
        found = plan.where_to_resume(self.run.checkpoints, self.world) if resume else None
        if resume and not found:
            plan.refuse_other_settings(self.run.path / "config.toml", self.config)
        if found:
            self.load(*found)
        elif source := self.config.train.init_from:
            plan.begin_with(Path(source), self.gpt, self.config, self.tokenizer, self.world)
        described = environment(self.world.device, self.world.size)

        def open_run() -> list[dict[str, Any]]:
            size = checkpoint.size_of(self.gpt, self.optimizers)
            checkpoint.check_space(self.run.checkpoints, size, self.config.train.keep_last)
            rows = self.run.open(to_toml(self.config), described, self.step)
            settings = asdict(self.config)
            self.run.sink = trackers.start(self.config.train.track, self.run.path, settings)
            return rows

        for row in distributed.first_does(open_run, self.world.device):
            if "val_loss" in row:
                self.validations[row["step"]] = {k: row[k] for k in ("val_loss", "val_bpb")}
        self.run.write("groups.txt", optim.describe(self.optimizers) + "\n")
        if self.world.first:
            for line in plan.introduction(
                self.config, self.data, self.batches, self.gpt, self.micro_batch, self.world
            ):
                log.info(line)
            log.info(optim.describe(self.optimizers, fold=True))
            log.info(f"writing to {self.run.path}")
            if resume:
                log.info(f"resumed from {found[0] if found else 'the start: nothing was saved'}")

        def trial(forward: Callable[..., Tensor]) -> None:
            forward(*self.batch(self.step, 0)).backward()

        wish, device = self.config.train.compile, self.world.device
        with self.watch.section("compilation"):
            self.forward, self.compile_seconds = plan.compiled(self.model, wish, trial, device)
        if self.compile_seconds and self.world.first:
            log.info("compiled in %.0f s", self.compile_seconds)

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Become the run that a verified checkpoint describes, if it is this one."""
        plan.refuse_other_run(self.config, state, self.data, self.tokenizer)
        steps, before = self.config.train.steps, state["config"]["train"]["steps"]
        if state["step"] > steps:
            raise ConfigError(f"train.steps = {steps}: {path} is at step {state['step']} already")
        if steps != before and self.world.first:
            log.warning(f"train.steps: {before} -> {steps}; the schedule of the rest follows it")
        checkpoint.load_weights(self.gpt, path)
        checkpoint.load_optimizers(self.optimizers, path)
        self.step = self.saved = self.watch.step = state["step"]
        self.seconds, self.earlier_seconds = state["seconds"], state["total_seconds"]
        self.spikes = health.Spikes(self.config.train.skip_spikes, **state.get("spikes", {}))
        if self.config.train.micro_batch == "auto" and state["ranks"] == self.world.size:
            # for the same roundings, also on a device with less room
            self.micro_batch = state["micro_batch"]

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
        seed = (self.config.train.seed * 1_000_003 + self.step) * 65_537 + self.world.rank
        torch.manual_seed(seed % (1 << 63))  # nothing random is carried from step to step
        self.schedule.set(self.optimizers, self.step)
        accumulation = self.per_rank // self.micro_batch
        loss = torch.zeros((), device=self.world.device)
        for micro in range(accumulation):
            distributed.sync_gradients(self.model, micro == accumulation - 1)
            part = self.forward(*self.batch(self.step, micro)) / accumulation
            if self.canonical:
                (part / self.world.size).backward()
                self.canonical.add()
            else:
                part.backward()
            loss += part.detach()
        if self.canonical:
            self.canonical.finish()
        grad_norm = health.norm(p.grad for p in self.gpt.parameters())
        weights, buffers = checkpoint.named_state(self.gpt, self.optimizers)
        state = (*weights.values(), *buffers.values())
        verdict = health.judge(loss, grad_norm, state, self.watch.stopping.number, self.world)
        skip = verdict.amiss != "state" and self.spikes.skip(verdict.grad_norm)
        if verdict.amiss and not skip:  # on any rank: all of them stop before the update
            self.refuse(verdict, loss)
        if limit := self.config.optim.grad_clip:
            grads = [p.grad for p in self.gpt.parameters() if p.grad is not None]
            torch._foreach_mul_(grads, (limit / grad_norm).clamp(max=1.0))
        for optimizer in self.optimizers:
            if not skip:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step = self.watch.step = self.step + 1
        return loss, verdict

    def loop(self) -> dict[str, Any]:
        """Steps, and what comes between them: save, then evaluate, then sample."""
        settings, speak = self.config.train, self.world.first
        last_step = min(settings.steps, settings.stop_at or settings.steps)
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
            if not (saving or evaluating or sampling or self.step % settings.log_every == 0):
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

    @property
    def tokens(self) -> int:
        return self.step * self.config.train.batch_tokens

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
            **optim.neuron_norms(self.optimizers, self.world.device),
            "tokens_per_second": round(rate, 1),
            **({"skipped": self.spikes.skipped} if self.spikes.factor else {}),
        }

    def save(self, retain: bool = True) -> None:
        """Publish a checkpoint of this step, unless there is one. Every rank takes part in
        gathering the tensors, one after the other, the first one writes, all learn how it went."""
        if self.saved == self.step:
            return
        with self.watch.section("save"):
            weights, buffers = checkpoint.named_state(self.gpt, self.optimizers)
            if bad := health.not_finite(weights | buffers, self.world.device):
                raise health.NonFinite(
                    f"not finite: {bad[0]} after step {self.step}; it is not saved"
                )
            health.check_replicas(weights | buffers, self.step, self.world)
            streams = [
                checkpoint.stream(tensors, keep=self.world.first)
                for tensors in (checkpoint.named_for_hf(weights), buffers)
            ]
            failure = None
            if self.world.first:
                try:
                    self.publish(*streams, retain)
                except Exception as error:
                    failure = error
            for stream in streams:  # after a failure too, the others send what is left
                for _ in stream:
                    pass
            distributed.first_does(lambda: raise_if(failure), self.world.device)
            self.saved = self.step

    def publish(self, weights: Iterator, buffers: Iterator, retain: bool) -> None:
        tokenizer, config, spikes = self.tokenizer, self.config, asdict(self.spikes)
        spikes.pop("factor")
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "total_seconds": self.earlier_seconds + time.perf_counter() - self.began,
            "ranks": self.world.size,
            "micro_batch": self.micro_batch,
            "spikes": spikes,
            "config": asdict(config),
            "data": self.data.fingerprint,
            "tokenizer": tokenizer and tokenizer.hash,
        }
        describes = hf.config_json(config.model, config.data.seq_len, tokenizer and tokenizer.eot)
        files = {
            "model.safetensors": weights,
            "optimizer.safetensors": buffers,
            "config.json": as_json(describes),
            "state.json": as_json(state),
            **(tokenizer.files() if tokenizer else {}),
        }
        checkpoint.write(self.run.checkpoints, self.step, files)
        if retain:
            keep, best = config.train, self.best_kept
            best = checkpoint.step_of(best) if keep.keep_best and best else None
            checkpoint.retain(
                self.run.checkpoints, keep.keep_last, self.step, keep.keep_every, best
            )

    def validate(self) -> dict[str, float | None]:
        """The loss on the whole validation split, the same on every rank. Raises Interrupted if
        meanwhile a rank is signalled to stop."""
        forward = self.gpt if self.forward is self.model else self.forward

        def step(*batch: Tensor, **more: Any) -> Tensor:
            if number := self.agree():
                raise Interrupted(number, "in the evaluation")
            return forward(*batch, **more)

        with self.watch.section("evaluation"):
            loss, targets = evaluate.validation_loss(
                step,
                self.data.val,
                self.config.data.seq_len,
                self.micro_batch,
                self.world,
                self.config.data.val_tokens,
            )
        bpb = evaluate.bits_per_byte(loss, targets, self.text_bytes)
        self.validations[self.step] = {"val_loss": loss, "val_bpb": bpb}
        return self.last_validation

    @property
    def stale(self) -> int:
        """Evaluations since the best one."""
        return sum(step > (self.best or 0) for step in self.validations)

    @property
    def exhausted(self) -> bool:
        """Whether train.patience is at its end."""
        return 0 < self.config.train.patience <= self.stale

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
            "total_seconds": round(self.earlier_seconds + time.perf_counter() - self.began, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 1) if self.seconds else None,
            "checkpoint": f"checkpoints/step-{self.step:06d}",
            "best_checkpoint": f"checkpoints/{kept.name}" if kept else None,
            "hugging_face": not hf.obstacles(self.config.model),
        }
        self.run.write("summary.json", json.dumps(summary, indent=1) + "\n")
        return summary

    def refuse(self, verdict: health.Verdict, loss: Tensor) -> NoReturn:
        """Raise NonFinite on all ranks, after leaving a report on the step and, if it is sound, the
        state before it: as a checkpoint, from which a resumed run repeats this very step."""
        weights, buffers = checkpoint.named_state(self.gpt, self.optimizers)
        grads = {name: p.grad for name, p in self.gpt.named_parameters()}
        of_state = verdict.amiss == "state"
        bad = health.not_finite(weights | buffers if of_state else grads, self.world.device)
        losses = torch.zeros(self.world.size, device=self.world.device)
        losses[self.world.rank] = loss
        report = {
            "step": self.step,
            "amiss": verdict.amiss,
            "rank": verdict.rank,
            "not_finite": bad,
            "loss_by_rank": [repr(x) for x in distributed.total(losses).tolist()],
            "groups": health.group_norms(self.optimizers),
            "seed": self.config.train.seed,
            "ranks": self.world.size,
            "windows": self.batches.windows(self.step).tolist(),  # (shard, offset) per sequence
            "config": asdict(self.config),
        }
        name = f"crash-{self.step:06d}.json"
        self.run.write(name, json.dumps(report) + "\n")
        if not of_state and self.step:
            self.save(retain=False)
        first = self.per_rank * verdict.rank
        what = f"the {verdict.amiss} of step {self.step}"
        if of_state:
            what = (
                f"a {'weight' if bad and bad[0] in weights else 'buffer'} before step {self.step}"
            )
        where = f"first in {bad[0]} of {len(bad)} tensors" if bad else "in no gradient"
        advice = (
            f"go on from the last checkpoint ({self.saved})"
            if of_state
            else "repeat just this step with: normuon-train run --resume --out "
            f"{shlex.quote(str(self.run.path))} train.stop_at={self.step + 1}; go past it with "
            "train.skip_spikes, or start anew with a lower optim.lr and auxiliary rates, or "
            "optim.grad_clip"
        )
        raise health.NonFinite(
            f"not finite: {what} (rank {verdict.rank}, sequences {first} to "
            f"{first + self.per_rank - 1} of the batch), {where}. No update was made; see {name}; "
            + advice,
            follows=self.world.rank != verdict.rank,
        )


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the last, happens after `step`."""
    return step == last or bool(every and step % every == 0)


def as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def raise_if(failure: BaseException | None) -> None:
    if failure is not None:
        raise failure

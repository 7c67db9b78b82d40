"""The run: the file to open first. `Trainer.take_step` is one training step.

A run is a function of its configuration and its data. The batch of step k is arithmetic, the
learning rate of step k is arithmetic, and the random generators are seeded anew from (seed, step,
rank), so a resumed run needs nothing but weights, optimizer buffers and k.
"""

import contextlib
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from nanonormuon import checkpoint, distributed, evaluate, hf, optim, plan, sample
from nanonormuon.config import Config, ConfigError, to_toml
from nanonormuon.data import Batches, validation_targets
from nanonormuon.log import RunDirectory, environment
from nanonormuon.model import GPT

log = logging.getLogger(__name__)


class NonFinite(ValueError):
    exit_code = 5


class Interrupted(Exception):
    """A signal ended the run after its work was saved."""

    def __init__(self, number: int, run: Path, step: int):
        super().__init__(
            f"stopped by signal {number} after step {step}, which is saved; go on with: "
            f"normuon-train run --resume --out {run}"
        )
        self.exit_code = 128 + number


@dataclass
class Stopping:
    """SIGINT and SIGTERM let the step finish and be saved; a second one ends the process at
    once."""

    number: int = 0

    @contextlib.contextmanager
    def watch(self) -> Iterator["Stopping"]:
        def note(number: int, _frame: Any) -> None:
            if self.number:
                os._exit(128 + number)
            self.number = number
            log.warning(
                "signal %d: finishing the step, then saving; once more ends at once", number
            )

        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------
# The run


def train(config: Config, out: Path, resume: bool = False) -> dict[str, Any]:
    """Train as configured, leaving everything in `out`; returns what summary.json says.

    Raises ConfigError, DataError, CheckpointError, RunError, NonFinite or OSError with one line
    that says what to do, and Interrupted after a signal.
    """
    with Stopping().watch() as stopping:
        try:
            world = distributed.start(config.train.device)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        plan.split_batch(config, world.size)  # refuses before anything is made
        out = Path(distributed.from_first(str(out), world.device))  # names carry the time
        with RunDirectory(out, world.first) as run:
            distributed.first_does(lambda: run.acquire(resume), world.device)
            trainer = Trainer(config, run, world)
            trainer.begin(resume)
            summary = trainer.loop(stopping)
        distributed.finish()
        return summary


class Trainer:
    """One run in memory: data, model, optimizers, and how far it is."""

    def __init__(self, config: Config, run: RunDirectory, world: distributed.World):
        self.began = time.perf_counter()
        self.run, self.world = run, world
        self.data, self.tokenizer = plan.open_corpus(config, world)
        self.config = config = plan.complete(config, self.data)
        T, val_tokens = config.data.seq_len, config.data.val_tokens

        self.per_rank = plan.split_batch(config, world.size)
        self.first_sequence = self.per_rank * world.rank
        self.batches = Batches(
            self.data.train, T, self.per_rank * world.size, config.train.seed, config.data.order
        )
        self.targets = validation_targets(self.data.val, val_tokens)
        self.text_bytes = None if val_tokens else self.data.val.bytes
        if self.text_bytes is None and self.tokenizer is not None:
            lengths = self.tokenizer.token_lengths()
            self.text_bytes = evaluate.count_bytes(self.data.val, lengths, val_tokens)

        self.dtype = distributed.compute_dtype(config.train.dtype, world.device)
        self.gpt = GPT(config.model, self.dtype).init_weights(config.train.seed).to(world.device)
        self.micro_batch = plan.micro_batch(config, self.gpt, self.per_rank, world)
        parallel = "ddp" if config.train.parallel == "auto" else config.train.parallel
        self.model = distributed.wrap(self.gpt, parallel, self.dtype, config.train.reshard)
        settings = asdict(config.optim)
        settings.pop("grad_clip")  # the loop's own; all others belong to one of these two, or fail
        shape = {k: settings.pop(k) for k in optim.Schedule.OWN}
        shape["momentum"] = settings["momentum"]
        self.optimizers = optim.make_optimizers(self.gpt, ns_dtype=self.dtype, **settings)
        self.schedule = optim.Schedule(config.train.steps, **shape)

        self.step = 0  # optimizer steps done
        self.seconds = self.earlier_seconds = 0.0  # of training; of earlier processes in all
        self.best, self.last_validation = math.inf, {}

    def begin(self, resume: bool) -> None:
        """Take up where an interrupted run left off, open the logs, compile."""
        found = plan.where_to_resume(self.run.checkpoints, self.world) if resume else None
        if found:
            self.load(*found)
        described = environment(self.world.device, self.world.size)
        rows = distributed.first_does(
            lambda: self.run.open(to_toml(self.config), described, self.step), self.world.device
        )
        self.run.write("groups.txt", optim.describe(self.optimizers) + "\n")
        for row in rows:
            self.best = min(self.best, row.get("val_loss", math.inf))
            if row["step"] == self.step and "val_loss" in row:
                self.last_validation = {k: row[k] for k in ("val_loss", "val_bpb")}
        if self.world.first:
            self.introduce()
            if resume:
                log.info(f"resumed from {found[0] if found else 'the start: nothing was saved'}")

        def trial(forward: Callable[..., Tensor]) -> None:
            forward(*self.batch(self.step, 0)).backward()

        wish, device = self.config.train.compile, self.world.device
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
        self.step, self.seconds = state["step"], state["seconds"]
        self.earlier_seconds = state["total_seconds"]
        self.best = math.inf if state["best_val_loss"] is None else state["best_val_loss"]
        if self.config.train.micro_batch == "auto" and state["ranks"] == self.world.size:
            # for the same roundings, also on a device with less room
            self.micro_batch = state["micro_batch"]

    def batch(self, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """This rank's micro-batch: tokens and targets, each (micro_batch, seq_len) int64."""
        i = self.first_sequence + micro * self.micro_batch
        tokens, targets = self.batches.batch(step, i, i + self.micro_batch)
        return tokens.to(self.world.device), targets.to(self.world.device)

    def take_step(self, signal: int = 0) -> tuple[Tensor, Tensor, int]:
        """One optimizer step. Returns this rank's mean loss and the gradient's norm, 0-d tensors,
        and the signal that any rank has had."""
        seed = (self.config.train.seed * 1_000_003 + self.step) * 65_537 + self.world.rank
        torch.manual_seed(seed % (1 << 63))  # nothing random is carried from step to step
        self.schedule.set(self.optimizers, self.step)
        accumulation = self.per_rank // self.micro_batch
        loss = torch.zeros((), device=self.world.device)
        for micro in range(accumulation):
            distributed.sync_gradients(self.model, micro == accumulation - 1)
            part = self.forward(*self.batch(self.step, micro)) / accumulation
            part.backward()
            loss += part.detach()
        grad_norm = total_norm(self.gpt)
        broken = not bool(torch.isfinite(loss) & torch.isfinite(grad_norm))
        broken, signal = distributed.largest([broken, signal], self.world.device)
        if broken:  # on any rank: all of them stop before the update
            raise NonFinite(self.blame(loss))
        if limit := self.config.optim.grad_clip:
            grads = [p.grad for p in self.gpt.parameters() if p.grad is not None]
            torch._foreach_mul_(grads, (limit / grad_norm).clamp(max=1.0))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss, grad_norm, int(signal)

    def loop(self, stopping: Stopping) -> dict[str, Any]:
        """Steps, and what comes between them: save, then evaluate, then sample."""
        settings, speak = self.config.train, self.world.first
        last_step = min(settings.steps, settings.stop_at or settings.steps)
        if self.step == 0:
            self.show_sample("before training")
        elif due(self.step, settings.eval_every, last_step) and not self.last_validation:
            self.validate()  # the process ended between this step's checkpoint and its evaluation
            self.run.record({"step": self.step, "tokens": self.tokens, **self.last_validation})
        terminal = sys.stderr.isatty()
        bar = tqdm(
            total=last_step, initial=self.step, unit="step", disable=not (speak and terminal)
        )
        logged, tick = (self.step, self.seconds), time.perf_counter()
        while self.step < last_step:
            loss, grad_norm, stopped = self.take_step(stopping.number)
            bar.update()
            saving = bool(stopped) or due(self.step, settings.save_every, last_step)
            evaluating = not stopped and due(self.step, settings.eval_every, last_step)
            sampling = not stopped and due(self.step, settings.sample_every, 0)
            if not (saving or evaluating or sampling or self.step % settings.log_every == 0):
                continue
            row = self.measure(loss, grad_norm, *logged, tick)
            logged = (self.step, self.seconds)
            if saving:
                self.save()
            if evaluating:
                row |= self.validate()
            self.run.record(row)
            if speak:
                announce(row, settings.steps, bar, terminal)
            if stopped:
                bar.close()
                raise Interrupted(stopped, self.run.path, self.step)
            if sampling and self.step < last_step:
                self.show_sample(f"after step {self.step}")
            tick = time.perf_counter()
        bar.close()
        self.show_sample("after training")
        return self.summarise()

    # ---------------------------------------------------------------------------------------------
    # Between the steps

    @property
    def tokens(self) -> int:
        return self.step * self.config.train.batch_tokens

    def measure(
        self, loss: Tensor, grad_norm: Tensor, since: int, seconds: float, tick: float
    ) -> dict[str, Any]:
        """A row of metrics.jsonl for the step just taken; reading the loss waits for the device."""
        mean_loss = float(distributed.total(loss) / self.world.size)
        self.seconds += time.perf_counter() - tick
        rate = (self.step - since) * self.config.train.batch_tokens / (self.seconds - seconds)
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "loss": mean_loss,
            "lr": self.config.optim.lr * self.schedule.lr(self.step - 1),
            "grad_norm": float(grad_norm),
            "tokens_per_second": round(rate, 1),
        }

    def save(self) -> None:
        """Publish a checkpoint; every rank takes part, the first one writes."""
        weights, buffers = checkpoint.collect(self.gpt, self.optimizers, keep=self.world.first)
        distributed.first_does(lambda: self.publish(weights, buffers), self.world.device)

    def publish(self, weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
        for name, value in (*weights.items(), *buffers.items()):
            if not bool(torch.isfinite(value).all()):
                raise NonFinite(f"not finite: {name} after step {self.step}; it is not saved")
        tokenizer, config = self.tokenizer, self.config
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "total_seconds": self.earlier_seconds + time.perf_counter() - self.began,
            "best_val_loss": None if self.best == math.inf else self.best,
            "ranks": self.world.size,
            "micro_batch": self.micro_batch,
            "config": asdict(config),
            "data": self.data.fingerprint,
            "tokenizer": tokenizer and tokenizer.hash,
        }
        describes = hf.config_json(config.model, config.data.seq_len, tokenizer and tokenizer.eot)
        files = {
            "model.safetensors": checkpoint.model_file(weights),
            "optimizer.safetensors": checkpoint.serialise(buffers),
            "config.json": as_json(describes),
            "state.json": as_json(state),
            **(tokenizer.files() if tokenizer else {}),
        }
        checkpoint.write(self.run.checkpoints, self.step, files)
        checkpoint.retain(self.run.checkpoints, config.train.keep_last, self.step)

    def validate(self) -> dict[str, float | None]:
        """The loss on the whole validation split, the same on every rank."""
        forward = self.gpt if self.forward is self.model else self.forward
        loss, targets = evaluate.validation_loss(
            forward,
            self.data.val,
            self.config.data.seq_len,
            self.micro_batch,
            self.world,
            self.config.data.val_tokens,
        )
        bpb = evaluate.bits_per_byte(loss, targets, self.text_bytes)
        self.last_validation = {"val_loss": loss, "val_bpb": bpb}
        self.best = min(self.best, loss)
        return self.last_validation

    def show_sample(self, when: str) -> None:
        settings, tokenizer = self.config.train, self.tokenizer
        if tokenizer is None or not settings.sample_tokens:
            return
        prompt = settings.sample_prompt  # every rank takes part: sharded layers run in step
        context = self.config.data.seq_len
        pieces = sample.stream(self.gpt, tokenizer, prompt, settings.sample_tokens, context=context)
        text = "".join(pieces)
        if self.world.first:
            lines = (prompt + text).splitlines()
            log.info("sample %s:\n%s", when, "\n".join(f"  | {line}" for line in lines))

    def summarise(self) -> dict[str, Any]:
        """Write summary.json: where the run stands, after its last step or stop_at."""
        summary = {
            "steps": self.step,
            "tokens": self.tokens,
            **self.last_validation,
            "best_val_loss": None if self.best == math.inf else self.best,
            "train_seconds": round(self.seconds, 3),
            "compile_seconds": round(self.compile_seconds, 3),
            "total_seconds": round(self.earlier_seconds + time.perf_counter() - self.began, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 1) if self.seconds else None,
            "checkpoint": f"checkpoints/step-{self.step:06d}",
        }
        self.run.write("summary.json", json.dumps(summary, indent=1) + "\n")
        return summary

    def blame(self, loss: Tensor) -> str:
        """Where a non-finite value was seen, for the error's one line."""
        first, last = self.first_sequence, self.first_sequence + self.per_rank - 1
        bad = [
            name
            for name, p in self.gpt.named_parameters()
            if p.grad is not None and not bool(torch.isfinite(checkpoint.local(p.grad)).all())
        ]
        what = "gradient" if bool(torch.isfinite(loss)) else "loss"
        tensors = f", first in {bad[0]} of {len(bad)} tensors" if bad else ", on another rank"
        return (
            f"not finite: the {what} of step {self.step} (rank {self.world.rank}, sequences "
            f"{first} to {last} of the batch){tensors}. Nothing was updated or saved since step "
            f"{self.step}: start anew with a lower optim.lr and auxiliary rates, or optim.grad_clip"
        )

    def introduce(self) -> None:
        """What is about to happen, in a few lines."""
        m, t, world, data = self.config.model, self.config.train, self.world, self.data
        epochs = self.batches.epoch(t.steps)
        parameters = sum(p.numel() for p in self.gpt.parameters())
        work = self.gpt.flops_per_token(self.config.data.seq_len) * t.steps * t.batch_tokens
        log.info(
            f"model: {parameters / 1e6:.2f}M parameters, {m.n_layer} layers, width {m.n_embd}, "
            f"vocabulary {m.vocab_size}; {str(self.dtype).removeprefix('torch.')} on {world.device}"
            f", {world.size} rank{'s' * (world.size > 1)}"
        )
        log.info(
            f"data: {data.path}, {data.train.tokens:,} train and {data.val.tokens:,} validation "
            "tokens"
        )
        log.info(
            f"plan: {t.steps:,} steps of {t.batch_tokens:,} tokens ({self.micro_batch} sequences "
            f"at a time per rank) = {epochs:.2f} epochs, {work:.2g} FLOP"
        )
        log.info(optim.describe(self.optimizers, fold=True))
        if odd := hf.obstacles(m):
            log.warning(f"Hugging Face's Qwen3 cannot load this model: {', '.join(odd)}")
        if epochs > 4:
            log.warning(
                f"{epochs:.1f} epochs: beyond 4, repetition teaches little (arXiv 2305.16264)"
            )
        log.info(f"writing to {self.run.path}")


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at the last, happens after `step`."""
    return step == last or bool(every and step % every == 0)


def as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def total_norm(model: nn.Module) -> Tensor:
    """The norm of the whole gradient, over all parameters and ranks' shards; 0-d, on the device."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def announce(row: dict[str, Any], steps: int, bar: tqdm, terminal: bool) -> None:
    """A logged step for people: a line, or on a terminal the bar and a line per evaluation."""
    line = (
        f"step {row['step']}/{steps}  loss {row['loss']:.4f}  lr {row['lr']:.3g}  "
        f"grad_norm {row['grad_norm']:.3g}  {row['tokens_per_second']:,.0f} tokens/s"
    )
    if "val_loss" in row:
        line += f"  val_loss {row['val_loss']:.4f}"
        if row["val_bpb"] is not None:
            line += f"  val_bpb {row['val_bpb']:.4f}"
    bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s")
    log.log(logging.DEBUG if terminal and "val_loss" not in row else logging.INFO, line)

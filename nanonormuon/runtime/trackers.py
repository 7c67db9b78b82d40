"""Metrics for TensorBoard and Weights & Biases, which can never stop a run, and delay its end by at
most 10 s.

A thread of its own hands them over; whatever goes wrong there is said once and ends the tracking,
not the run. metrics.jsonl has everything in any case.
"""

import logging
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanonormuon.errors import need

log = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds that the end of a run waits for what is still to be handed over


class Tracker:
    """`open_sink` runs in the thread and returns a function for rows and one that closes."""

    def __init__(self, name: str, open_sink: Callable[[], tuple[Callable, Callable]]):
        self.name, self.open_sink = name, open_sink
        self.rows: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.work, name=name, daemon=True)
        self.thread.start()

    def work(self) -> None:
        try:
            send, close = self.open_sink()
            while (row := self.rows.get()) is not None:
                send(row)
            close()
        except BaseException as error:  # also SystemExit, which a package may raise
            log.warning(f"{self.name}: {type(error).__name__}: {error}; the run goes on without it")

    def __call__(self, row: dict[str, Any]) -> None:
        """Hand over a row of metrics.jsonl; returns at once."""
        self.rows.put(row)

    def close(self) -> None:
        self.rows.put(None)
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            log.warning(f"{self.name}: no answer in {PATIENCE:.0f} s; not all metrics reached it")


def start(name: str, run: Path, settings: dict[str, Any]) -> Tracker | None:
    """A tracker by name, "" for none. settings: the run's configuration, as nested dicts."""
    sinks = {"tensorboard": tensorboard, "wandb": wandb}
    return Tracker(name, lambda: sinks[name](run, settings)) if name else None


def numbers(row: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}


def tensorboard(run: Path, settings: dict[str, Any]) -> tuple[Callable, Callable]:
    """Event files in RUN/tensorboard; `tensorboard --logdir runs` shows them."""
    need("tensorboard", "train.track = tensorboard")
    writer = need("torch.utils.tensorboard", "train.track = tensorboard").SummaryWriter(
        str(run / "tensorboard")
    )

    def send(row: dict[str, Any]) -> None:
        for key, value in numbers(row).items():
            writer.add_scalar(key, value, row["step"])

    return send, writer.close


def wandb(run: Path, settings: dict[str, Any]) -> tuple[Callable, Callable]:
    """Weights & Biases: online where WANDB_API_KEY is set, else files for `wandb sync`."""
    online = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    session = need("wandb", "train.track = wandb").init(
        project=os.environ.get("WANDB_PROJECT", "nanonormuon"),
        name=run.name,
        dir=str(run),
        config=settings,
        mode=os.environ.get("WANDB_MODE", online),
    )
    return (lambda row: session.log(numbers(row), step=row["step"])), session.finish

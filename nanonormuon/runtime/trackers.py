"""Metrics for TensorBoard and Weights & Biases. A tracker that fails is dropped with a warning."""

import logging
import os
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from nanonormuon.errors import Interrupted
from nanonormuon.runtime.packages import need

log = logging.getLogger(__name__)


class Tracker:
    """Sends rows of metrics.jsonl to a generator, which ends at its first error."""

    def __init__(self, name: str, outlet: Generator):
        self.name, self.outlet = name, outlet
        self.attempt(next, outlet)

    def __call__(self, row: dict[str, Any]) -> None:
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        self.attempt(self.outlet.send, (numbers, row["step"]))

    def close(self) -> None:
        self.attempt(self.outlet.close)

    def attempt(self, call: Callable, *arguments: Any) -> None:
        try:
            call(*arguments)
        except StopIteration:
            pass  # it has failed before, with a warning
        except (KeyboardInterrupt, Interrupted):
            raise
        except BaseException as error:  # some packages raise SystemExit
            log.warning(f"{self.name}: {type(error).__name__}: {error}; continuing without it")


def start(name: str, run: Path, settings: dict[str, Any]) -> Tracker | None:
    """Open the tracker `name`, if not "". settings: the run's configuration as nested dicts."""
    outlets = {"tensorboard": tensorboard, "wandb": wandb}
    return Tracker(name, outlets[name](run, settings)) if name else None


def tensorboard(run: Path, settings: dict[str, Any]) -> Generator:
    """Write event files to RUN/tensorboard, for `tensorboard --logdir runs`."""
    need("tensorboard", "train.track = tensorboard")
    package = need("torch.utils.tensorboard", "train.track = tensorboard")
    with closing(package.SummaryWriter(str(run / "tensorboard"))) as writer:
        while True:
            numbers, step = yield
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)
            writer.flush()  # by default it buffers two minutes, which a kill would lose


def wandb(run: Path, settings: dict[str, Any]) -> Generator:
    """Log to Weights & Biases: online if WANDB_API_KEY is set, else to files for `wandb sync`."""
    online = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    session = need("wandb", "train.track = wandb").init(
        project=os.environ.get("WANDB_PROJECT", "nanonormuon"),
        name=run.name,
        dir=str(run),
        config=settings,
        mode=os.environ.get("WANDB_MODE", online),
    )
    try:
        while True:
            numbers, step = yield
            session.log(numbers, step=step)
    finally:
        session.finish()

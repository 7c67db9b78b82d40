"""How far a long pass over data is."""

import logging
import sys
import time

from tqdm import tqdm

log = logging.getLogger(__name__)


class Progress:
    """Bytes, their rate and the time left: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.start = self.said = time.monotonic()

    def __enter__(self) -> "Progress":
        terminal = bool(self.total) and sys.stderr.isatty()
        self.bar = tqdm(
            desc=self.what, total=self.total, unit="B", unit_scale=True, disable=not terminal
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, n: int) -> None:
        self.done += n
        self.bar.update(n)
        now = time.monotonic()
        if self.bar.disable and self.total and now - self.said > 30:
            self.said, rate = now, self.done / (now - self.start)
            log.info(
                "prepare: %s: %.1f of %.1f MB, %.1f MB/s, %.0f s left",
                self.what, self.done / 1e6, self.total / 1e6, rate / 1e6,
                (self.total - self.done) / max(rate, 1),
            )  # fmt: skip

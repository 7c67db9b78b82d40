"""The prompts of `sample`, from a command line, a file or a terminal; and its output."""

import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nanonormuon.errors import UsageError
from nanonormuon.model import GPT
from nanonormuon.sample import Text, cache_bytes, write
from nanonormuon.storage.files import read_file
from nanonormuon.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def prompts(prompt: str, file: Path | None, interactive: bool) -> Iterator[str]:
    """Yield the prompts of one command: `prompt` ("-": standard input), the text of a file, or each
    line typed until the end of input. Raises UsageError."""
    if interactive:
        log.info("Type a prompt and press Enter; Ctrl-D quits.")
        while True:
            print("prompt> ", end="", file=sys.stderr, flush=True)
            if not (line := sys.stdin.readline()):
                break
            yield line.rstrip("\n")
        print(file=sys.stderr)
    elif file is not None:
        try:
            yield read_file(file).decode()
        except (OSError, ValueError) as error:  # a ValueError: no regular file, or not UTF-8
            problem = getattr(error, "strerror", None) or str(error).removeprefix(f"{file}: ")
            raise UsageError(f"--file {file}: {problem}; expected a text file in UTF-8") from None
    else:
        yield sys.stdin.read() if prompt == "-" else prompt


def show(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    num: int = 1,
    stops: Sequence[str] = (),
    as_json: bool = False,
    **settings: Any,
) -> None:
    """Print `num` continuations of a prompt and log the speed: one as it is generated, several (or
    JSON) once all are complete. settings: those of sample.generate."""
    start = time.perf_counter()
    rows = [Text(tokenizer, stops) for _ in range(num)]
    texts = [""] * num
    live = num == 1 and not as_json
    if live:
        print(prompt, end="")
    for pieces in write(model, rows, prompt, max_tokens, **settings):
        texts = [text + piece for text, piece in zip(texts, pieces)]
        if live:
            print(pieces[0], end="", flush=True)
    for i, text in enumerate(texts):
        if as_json:
            row = {"prompt": prompt, "text": text, "seed": settings.get("seed", 0) + i}
            print(json.dumps(row, ensure_ascii=False))
        else:
            print("" if live else f"--- sample {i + 1}\n{prompt}{text}")
    sys.stdout.flush()
    seconds, tokens = time.perf_counter() - start, sum(row.tokens for row in rows)
    speed = f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s"
    log.info(f"{speed}; the cache takes {cache_bytes(model):,} bytes per token")

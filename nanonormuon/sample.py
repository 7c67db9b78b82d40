"""Text from a model, token by token, with a KV cache."""

import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanonormuon.errors import TokenizerError, UsageError
from nanonormuon.model import GPT, Cache
from nanonormuon.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Tensor,
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    context: int = 1 << 30,
) -> Iterator[Tensor]:
    """prompt (B, T) int64, T >= 1 -> up to max_tokens times the next tokens (B,), on the CPU.

    temperature 0 takes the likeliest token. top_k > 0 keeps so many of the likeliest tokens, top_p
    the fewest that together have that probability. The draw is made on the CPU, row i's from
    seed + i: one seed, one text, on every device with the same logits and in any batch. context:
    tokens that the model was trained to look back on; when they are full, the older half is
    forgotten.
    """
    random = [torch.Generator().manual_seed(seed + i) for i in range(len(prompt))]
    device = model.embed_tokens.weight.device
    seen, cache, tokens = prompt, None, prompt
    size = min(context, prompt.size(1) + max_tokens)
    for _ in range(max_tokens):
        if cache is None or cache.length == size:
            tokens = seen if seen.size(1) < size else seen[:, -max(1, size // 2) :]
            cache = Cache(model, prompt.size(0), size)
        logits = model(tokens.to(device), cache=cache)[:, -1].cpu()
        choice = draw(logits, temperature, top_k, top_p, random)
        yield choice
        tokens = choice[:, None]
        seen = torch.cat([seen, tokens], 1)


def draw(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    random: Sequence[torch.Generator],
) -> Tensor:
    """logits (B, vocab_size) -> (B,) token ids; each row has a generator of its own."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ranked, order = probabilities.sort(descending=True)
        before = ranked.cumsum(-1) - ranked  # a token stays if those ahead of it do not suffice
        probabilities.scatter_(1, order, ranked.masked_fill(before >= top_p, 0))
    rows = zip(probabilities, random, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=own) for row, own in rows])


class Text:
    """The printable text of one sample, from its tokens as they come.

    A character whose bytes are spread over tokens comes when it is complete, and what might be the
    beginning of a stop string is held back until it is not. `ended`: after the end of the document,
    an id without a token (a row that pads the vocabulary) or a stop string, which is left out.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.tokenizer, self.stops, self.ended = tokenizer, [s for s in stops if s], False
        self.stream = tokenizer.stream()
        self.held, self.tokens = "", 0

    def add(self, token: int) -> str:
        """What can be printed after one more token; nothing once the text has ended."""
        if self.ended:
            return ""
        self.tokens += 1
        if token == self.tokenizer.eot:
            return self.finish()
        try:
            return self._pass(self.stream.add(token))
        except TokenizerError:
            return self.finish()

    def finish(self) -> str:
        """The rest, when no token follows."""
        if self.ended:
            return ""
        text = self._pass(self.stream.finish())
        if not self.ended:
            text, self.held, self.ended = text + self.held, "", True
        return text

    def _pass(self, text: str) -> str:
        text = self.held + text
        found = [i for i in (text.find(stop) for stop in self.stops) if i >= 0]
        if found:
            self.held, self.ended = "", True
            return text[: min(found)]
        begun = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        keep = len(text) - max(begun, default=0)
        self.held = text[keep:]
        return text[:keep]


def write(
    model: GPT, rows: Sequence[Text], prompt: str, max_tokens: int, **settings: Any
) -> Iterator[list[str]]:
    """Continue `prompt` once per row, all at once, until every text has ended: the new printable
    piece of each row, token by token. settings: as for `generate`; row i draws from seed + i."""
    tokenizer = rows[0].tokenizer
    ids = [tokenizer.eot, *tokenizer.encode(prompt)]  # as every document begins
    for row in rows:
        row.stream = tokenizer.stream(ids)
    for choices in generate(model, torch.tensor([ids] * len(rows)), max_tokens, **settings):
        yield [row.add(token) for row, token in zip(rows, choices.tolist())]
        if all(row.ended for row in rows):
            return
    yield [row.finish() for row in rows]


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    stops: Sequence[str] = (),
    **settings: Any,
) -> Iterator[str]:
    """The continuation of `prompt` in printable pieces, up to the end of the document, a stop
    string or max_tokens. settings: as for `generate`."""
    for (piece,) in write(model, [Text(tokenizer, stops)], prompt, max_tokens, **settings):
        if piece:
            yield piece


# ------------------------------------------------------------------------------------------------
# For people at a terminal, and for programs


def prompts(prompt: str, file: Path | None, interactive: bool) -> Iterator[str]:
    """The prompts of one call: the text itself, of standard input for "-", of a file, or line by
    line from a person, until the end of the input. Raises UsageError for a file."""
    if interactive:
        while True:
            print("prompt> ", end="", file=sys.stderr, flush=True)
            if not (line := sys.stdin.readline()):
                print(file=sys.stderr)
                return
            yield line.rstrip("\n")
    elif file is not None:
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{file}: not UTF-8 at offset {error.start}") from None
        except OSError as error:
            raise UsageError(f"--file {file}: {error.strerror}, expected a text file") from None
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
    """Print `num` continuations of a prompt: one as it comes, several when all are complete, or
    lines of JSON; then the speed, in the log. settings: as for `generate`."""
    start, rows, texts = (
        time.perf_counter(),
        [Text(tokenizer, stops) for _ in range(num)],
        [""] * num,
    )
    live = num == 1 and not as_json
    if live:
        sys.stdout.write(prompt)
    for pieces in write(model, rows, prompt, max_tokens, **settings):
        texts = [text + piece for text, piece in zip(texts, pieces)]
        if live:
            sys.stdout.write(pieces[0])
            sys.stdout.flush()
    if live:
        sys.stdout.write("\n")
    for i, text in enumerate(texts if not live else ()):
        row = {"prompt": prompt, "text": text, "seed": settings.get("seed", 0) + i}
        as_text = f"--- sample {i + 1}\n{prompt}{text}"
        print(json.dumps(row, ensure_ascii=False) if as_json else as_text)
    sys.stdout.flush()
    seconds, tokens = time.perf_counter() - start, sum(row.tokens for row in rows)
    log.info(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")

"""Multiple choice by log-likelihood: the model chooses the most probable answer.

Contexts, continuations and both accuracies follow EleutherAI's lm-evaluation-harness (tasks
hellaswag, arc_easy, arc_challenge, piqa; zero-shot), so that results are comparable.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from nanonormuon.errors import DataError
from nanonormuon.model import GPT
from nanonormuon.storage.files import progress, read_file, read_jsonl
from nanonormuon.text.tokenizer import Tokenizer

BATCH = 16  # sequences at a time


@dataclass(frozen=True)
class Question:
    context: str
    choices: list[str]
    answer: int
    place: str = field(default="", compare=False)  # file and line, for messages

    def __post_init__(self) -> None:
        if not all(isinstance(text, str) for text in (self.context, *self.choices)):
            raise ValueError("expected text as context and choices")
        if not 0 <= self.answer < len(self.choices) or not all(self.choices):
            raise ValueError(f"answer {self.answer} of {len(self.choices)} choices")


def read(file: Path) -> list[Question]:
    """Read questions from a JSONL file: HellaSwag, ARC or PIQA as published (PIQA's answers are in
    NAME-labels.lst beside NAME.jsonl), or objects with "context" or "question", "choices" and
    "answer", an index. Raises DataError naming the line."""
    labels = file.with_name(f"{file.stem}-labels.lst")
    answers = read_file(labels).decode(errors="replace").split() if labels.exists() else None
    try:
        rows = list(read_jsonl(file))
    except ValueError as error:
        raise DataError(str(error)) from None
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}, expected a JSONL file of questions") from None
    if not rows:
        raise DataError(f"{file}: no questions")
    if answers is not None and len(answers) != len(rows):
        found = f"{len(answers)} answers to {len(rows)} questions"
        raise DataError(f"{labels}: {found}, expected one per line of {file.name}: copy both again")
    questions = []
    for number, row in rows:
        try:
            if answers is not None:
                row["label"] = answers[len(questions)]
            questions.append(replace(parse(row), place=f"{file}: line {number}"))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            own = '{"question" or "context", "choices": [...], "answer": index}'
            expected = f"expected HellaSwag, ARC, PIQA (with its -labels.lst) or {own}"
            raise DataError(f"{file}: line {number}: {what}; {expected}") from None
    return questions


def parse(row: dict[str, Any]) -> Question:
    """Parse a question. Raises LookupError, TypeError, ValueError for an unknown layout."""
    if "endings" in row:  # HellaSwag; its brackets are left over from WikiHow's markup
        ctx = f"{row['ctx_a']} {row['ctx_b'].capitalize()}" if "ctx_a" in row else row["ctx"]
        context = without_markup(f"{row['activity_label']}: {ctx}")
        return Question(context, [without_markup(e) for e in row["endings"]], int(row["label"]))
    if "goal" in row:  # PIQA
        context = f"Question: {row['goal']}\nAnswer:"
        return Question(context, [row["sol1"], row["sol2"]], int(row["label"]))
    if "answerKey" in row:  # ARC, as AI2 published it and as the Hugging Face hub has it
        stem, choices = row["question"], row.get("choices")
        if isinstance(stem, dict):
            stem, choices = stem["stem"], stem["choices"]
        if isinstance(choices, dict):
            choices = [{"text": t, "label": n} for t, n in zip(choices["text"], choices["label"])]
        names = [c["label"] for c in choices]
        texts = [c["text"] for c in choices]
        return Question(f"Question: {stem}\nAnswer:", texts, names.index(row["answerKey"]))
    asked = row["context"] if "context" in row else f"Question: {row['question']}\nAnswer:"
    return Question(asked, list(row["choices"]), int(row["answer"]))


def without_markup(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def accuracy(
    model: GPT, tokenizer: Tokenizer, questions: Sequence[Question], window: int
) -> dict[str, Any]:
    """Return the share of questions whose right choice has the highest log-likelihood, plain and
    per character of the choice, with standard errors."""
    rows = []
    for q in questions:
        before = len(tokenizer.encode(q.context, q.place))
        for choice in q.choices:
            ids = tokenizer.encode(f"{q.context} {choice}", q.place)
            rows.append(([tokenizer.eot, *ids], len(ids) - before))
    scores = iter(log_likelihoods(model, rows, window))
    right: dict[str, list[bool]] = {"accuracy": [], "accuracy_normalised": []}
    for q in questions:
        plain = [next(scores) for _ in q.choices]
        per_character = [score / len(choice) for score, choice in zip(plain, q.choices)]
        for found, values in zip(right.values(), (plain, per_character)):
            found.append(values.index(max(values)) == q.answer)
    n = len(questions)
    result: dict[str, Any] = {"questions": n}
    for name, found in right.items():
        result[name] = share = sum(found) / n
        result[f"{name}_stderr"] = math.sqrt(share * (1 - share) / max(n - 1, 1))
    return result


@torch.no_grad()
def log_likelihoods(model: GPT, rows: Sequence[tuple[list[int], int]], window: int) -> list[float]:
    """Return for each (ids, n) the log-probability (nats) of the last n tokens in the window."""
    device = model.embed_tokens.weight.device
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))  # little padding per batch
    found = [0.0] * len(rows)
    for start in progress("answering", None, "batch", iterable=range(0, len(order), BATCH)):
        part = order[start : start + BATCH]
        cut = [rows[i][0][-(window + 1) :] for i in part]
        # padding on the right, which causal attention does not see
        tokens = pad_sequence([torch.tensor(ids[:-1]) for ids in cut], batch_first=True)
        h = model.hidden(tokens.to(device))
        for i, ids, states in zip(part, cut, h):
            end = len(ids) - 1
            n = min(rows[i][1], end)
            logits = model.logits(states[end - n : end])
            targets = torch.tensor(ids[-n:], device=device)
            found[i] = -float(F.cross_entropy(logits, targets, reduction="sum"))
    return found

"""Judging a trained model: it repeats the run's own validation loss, multiple choice picks what the
probabilities say, and results are kept."""

import errno
import gzip
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanonormuon.cli import app as cli
from nanonormuon.errors import CheckpointError, DataError
from nanonormuon.model import GPT, GPTConfig
from nanonormuon.pretrained import breakdown, judge, models
from nanonormuon.pretrained import multiple_choice as choices
from nanonormuon.runtime.distributed import World
from nanonormuon.storage.files import locked
from nanonormuon.storage.shards import open_data
from nanonormuon.text import tokenizer


def test_it_repeats_what_the_run_measured_and_keeps_results(trained, bpe_data, text, capsys):
    summary = json.loads((trained / "summary.json").read_text())
    for arguments in ([], ["--data", str(bpe_data)]):  # the second is another name for the same
        assert cli.main(["evaluate", str(trained), *arguments, "--json"]) == 0
        (result,) = json.loads(capsys.readouterr().out)
        assert result["loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
        assert result["bits_per_byte"] == pytest.approx(summary["val_bpb"], rel=1e-6)
        assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
        assert result["step"] == 60
    assert cli.main(["evaluate", str(trained), "--max-tokens", "500"]) == 0
    assert cli.main(["evaluate", str(trained)]) == 0  # again: replaced, not added
    assert "perplexity" in capsys.readouterr().out
    kept = judge.kept(trained / judge.RESULTS)
    assert [(r["set"], r["tokens"] == 500) for r in kept] == [
        (bpe_data.name, True), (bpe_data.name, False),
    ]  # fmt: skip
    assert {(r["path"], r["dtype"]) for r in kept} == {(str(bpe_data.resolve()), "float32")}


def test_the_breakdown_of_a_loss(trained, bpe_data, capsys):
    """Groups by counting, losses and kurtosis by brute force, weights as before the rounding."""
    assert cli.main(["evaluate", str(trained), "--breakdown", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    found, data = result["breakdown"], open_data(bpe_data)
    table = found["by_frequency"]
    assert sum(row["targets"] for row in table) == result["tokens"]
    total = sum(row["targets"] * row["loss"] for row in table if row["targets"])
    assert total / result["tokens"] == pytest.approx(result["loss"], rel=1e-5)

    model, _, _ = models.load_run(trained, torch.float32, torch.device("cpu"))
    counts, group = breakdown.groups(data.train, model.config.vocab_size)
    train = np.concatenate([*data.train.shards])
    assert [*counts] == [int((train == i).sum()) for i in range(model.config.vocab_size)]
    shares = [counts[group <= i].sum() / counts.sum() * 100 for i in range(len(breakdown.SHARES))]
    rarest = [counts[(group == i) & (counts > 0)].min(initial=1 << 40) for i in range(len(shares))]
    for share, edge, least in zip(shares, breakdown.SHARES, rarest):
        assert edge <= share + 1e-9 <= edge + 100 * least / counts.sum() + 1e-6

    before = [p.clone() for p in model.parameters()]
    with breakdown.in_four_bits(model):
        weight = model.layers[0].mlp.up_proj.weight
        assert all(len(row.unique()) <= 15 for row in weight)
        assert not torch.equal(weight, before[0])
    assert all(map(torch.equal, before, model.parameters()))

    x = torch.randn(2, 3, 5).double()
    with breakdown.watched(model) as kurtosis:
        linear = model.layers[0].mlp.up_proj
        linear(F.pad(x, (0, linear.in_features - 5)).float())
    padded = F.pad(x, (0, linear.in_features - 5)).flatten(0, 1)
    z = (padded - padded.mean(1, keepdim=True)) / padded.std(1, correction=0, keepdim=True)
    assert kurtosis["0.mlp.up_proj"] == [pytest.approx(float((z**4).mean()) - 3, rel=1e-5)]
    assert cli.main(["evaluate", str(trained), "--breakdown", "--max-tokens", "99"]) == 0
    assert "97 to 100 %" in capsys.readouterr().out


def test_results_that_cannot_be_kept_are_not_lost(trained, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setattr(judge, "replace_file", full)
    assert cli.main(["evaluate", str(run), "--max-tokens", "99"]) == 0
    found = capsys.readouterr()
    assert "perplexity" in found.out and found.err.count("warning") == 1 and "No space" in found.err
    monkeypatch.setattr(judge, "validation_loss", None)  # damage is found before computing
    for damage in ('{"results": [', '{"results": {}}', '{"results": [{"set": "a"}]}'):
        (run / judge.RESULTS).write_text(damage)
        assert cli.main(["evaluate", str(run)]) == 4
        assert str(run / judge.RESULTS) in capsys.readouterr().err


def test_results_on_two_fields_of_a_file_are_both_kept(tmp_path):
    result = {"set": "a", "path": "/a", "loss": 1.0, "tokens": 9, "step": 4}
    for row in (result, result | {"field": "body"}, result | {"loss": 2.0}):
        judge.keep(tmp_path / "kept.json", [row])
    kept = judge.kept(tmp_path / "kept.json")
    assert [(row["loss"], row.get("field")) for row in kept] == [(1.0, "body"), (2.0, None)]


def test_of_two_evaluations_at_once_the_second_waits_to_keep_its_results(tmp_path, monkeypatch):
    seen = []

    def alone(work):
        def then(*arguments):
            with pytest.raises(BlockingIOError), locked(tmp_path / ".kept.json.lock"):
                pass
            seen.append(work.__name__)
            return work(*arguments)

        return then

    for work in (judge.kept, judge.replace_file):
        monkeypatch.setattr(judge, work.__name__, alone(work))
    judge.keep(tmp_path / "kept.json", [{"set": "a", "loss": 1.0}])
    assert seen == ["kept", "replace_file"]
    with locked(tmp_path / ".kept.json.lock"):  # which is free again
        pass


def test_raw_text_is_tokenized_whole_and_counted_in_bytes(trained, tmp_path):
    content = "the cat sat on a mat.\nnaïve 東京\n" * 9
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    (found,) = judge.evaluate(trained, texts=[tmp_path / "a.txt"], device="cpu")
    model, own, _ = models.load_run(trained, torch.float32, torch.device("cpu"))
    ids = torch.tensor([own.eot, *own.encode(content)])
    nats = 0.0
    for start in range(0, len(ids) - 1, 32):
        part = ids[start : start + 33]
        with torch.no_grad():
            nats += float(F.cross_entropy(model(part[None, :-1])[0], part[1:], reduction="sum"))
    assert found["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    size = len(content.encode())
    assert (found["tokens"], found["bytes"]) == (len(ids) - 1, size)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_text_is_read_as_prepare_reads_it(trained, tmp_path, capsys):
    """Records, compressed files and directories; what is no text is refused."""
    texts = ["the cat sat on a mat.\n" * 9, "the dog ran home.\n" * 5]
    folder = tmp_path / "in"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    lines = "".join(json.dumps({"body": text, "n": 1}) + "\n" for text in texts)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    given = ["--text", folder, "--text", tmp_path / "a.jsonl.gz", "--text-field", "body", "--json"]
    assert cli.main(["evaluate", str(trained), *map(str, given)]) == 0
    found = [
        {key: value for key, value in result.items() if key not in ("set", "path")}
        for result in json.loads(capsys.readouterr().out)
    ]
    assert found[0] == found[1] and found[0]["bytes"] == sum(map(len, texts))
    (tmp_path / "b.txt").write_bytes(b"\0\1\2" * 99)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("b.txt", "pipe", "loop", "/dev/zero", "a.jsonl.gz"):
        assert cli.main(["evaluate", str(trained), "--text", str(tmp_path / name)]) == 3
        assert name in capsys.readouterr().err
    assert cli.main(["evaluate", str(trained), "--text", ""]) == 2


def test_an_id_that_the_model_lacks_is_refused(tmp_path):
    model = GPT(GPTConfig(vocab_size=100, n_layer=1, n_head=2, n_embd=16)).init_weights(0).eval()
    (tmp_path / "a.txt").write_text("abc abc x abc")
    byte, world = tokenizer.get("byte"), World(0, 1, torch.device("cpu"))
    with pytest.raises(DataError, match=r"a\.txt: token 0: expected an id below 100, found 256"):
        judge.on_split(model, byte, world, 8, 8, 0, judge.read_text(tmp_path / "a.txt", byte))
    text = judge.read_text(tmp_path / "a.txt", byte)
    text.shards[0][0] = 0
    with pytest.raises(DataError, match=r"token 9: expected an id below 100, found 120"):
        judge.on_split(model, byte, world, 8, 8, 0, text)


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="expected a run directory"):
        models.find_checkpoint(tmp_path)


def test_a_run_whose_data_are_gone_asks_for_others():
    state = {"config": {"data": {"path": "/nonexistent/data", "format": "shards"}}}
    with pytest.raises(DataError, match="missing: give --data"):
        models.data_of(state, tokenizer.get("byte"))
    with pytest.raises(DataError, match=r"data are unknown: give --data \(evaluate: or --text\)"):
        models.data_of(None, tokenizer.get("byte"))


def test_what_evaluation_refuses(trained, shards, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"context": "a", "choices": ["b"], "answer": 0}\n{"x": 1}')
    (tmp_path / "none.jsonl").write_text("\n")
    (tmp_path / "cut.jsonl").write_bytes('\n{"context": "é'.encode()[:-1])
    (tmp_path / "sums.jsonl").write_text('{"context": "1+1", "choices": [1, 2], "answer": 1}')
    (tmp_path / "odd.jsonl").write_text('{"goal": "a", "sol1": "b", "sol2": "c"}')
    (tmp_path / "odd-labels.lst").write_bytes(b"\xff")
    (tmp_path / "far.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "answer": 2}')
    for arguments, code, words in (
        (["--data", shards], 3, "hash: expected"),
        (["--data", tmp_path / "no"], 3, "no such data directory"),
        (["--text", tmp_path / "no.txt"], 3, "no.txt"),
        (["--text", tmp_path / "empty.txt"], 3, "empty"),
        (["--window", 8, "--stride", 9], 2, "--stride 9: expected 1 to --window 8"),
        (["--choices", tmp_path / "bad.jsonl"], 3, "bad.jsonl: line 2: no field 'question'"),
        (["--choices", tmp_path / "cut.jsonl"], 3, "cut.jsonl: line 2: 'utf-8' codec"),
        (["--choices", tmp_path / "sums.jsonl"], 3, "sums.jsonl: line 1: expected text"),
        (["--choices", tmp_path / "odd.jsonl"], 3, "odd.jsonl: line 1: "),
        (["--choices", tmp_path / "none.jsonl"], 3, "no questions"),
        (["--choices", tmp_path / "far.jsonl"], 3, "answer 2 of 2 choices"),
        (["--device", "gpu"], 2, "--device gpu: expected auto"),
        (["--windw", 8], 2, "--window"),
    ):
        assert cli.main(["evaluate", str(trained), *map(str, arguments)]) == code
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error


def test_text_that_the_tokenizer_lacks_is_named(tmp_path):
    byte = tokenizer.get("byte")
    byte.byte_ids = {}  # as of a kind that encodes UTF-8 alone
    (tmp_path / "a.txt").write_bytes(b"a" * 2000 + b"\xff")
    (tmp_path / "q.jsonl").write_text(r'{"context": "the \ud800", "choices": ["a"], "answer": 0}')
    with pytest.raises(DataError, match=r"a\.txt: offset 2000: byte 0xff"):
        judge.read_text(tmp_path / "a.txt", byte)
    with pytest.raises(DataError, match=r"q\.jsonl: line 1: offset 4: byte 0xed"):
        choices.accuracy(None, byte, choices.read(tmp_path / "q.jsonl"), 8)


class Bigram:
    """A model whose next byte depends on the last alone, so that anybody can do its sums."""

    def __init__(self):
        self.table = torch.full((257, 257), 0.1)
        for a, b, weight in ((" ", "c", 30), ("c", "a", 60), ("a", "t", 90), (" ", "d", 90),
                             ("d", "o", 30), ("o", "g", 30), ("o", "o", 80)):  # fmt: skip
            self.table[ord(a), ord(b)] = weight
        self.table = (self.table / self.table.sum(1, keepdim=True)).log()
        self.embed_tokens = torch.nn.Embedding(1, 1)

    def hidden(self, tokens):
        return tokens

    def logits(self, h):
        return self.table[h]

    def score(self, context, choice):
        text = (context + " " + choice).encode()
        return sum(float(self.table[a, b]) for a, b in zip(text[len(context) - 1 :],
                                                           text[len(context) :]))  # fmt: skip


def test_accuracies_are_those_of_the_probabilities():
    model, byte = Bigram(), tokenizer.get("byte")
    questions = [
        choices.Question("a pet", ["cat", "dog", "xyz"], 0),
        choices.Question("another", ["xyz", "doog", "zz"], 1),
        choices.Question("a long one", ["d", "caticatcat"], 1),  # plain prefers the short
        choices.Question("wrong", ["q", "cat"], 0),
    ]
    plain = normalised = 0
    for q in questions:
        scores = [model.score(q.context, c) for c in q.choices]
        plain += int(np.argmax(scores)) == q.answer
        normalised += int(np.argmax([s / len(c) for s, c in zip(scores, q.choices)])) == q.answer
    found = choices.accuracy(model, byte, questions, 64)
    assert (found["accuracy"], found["accuracy_normalised"]) == (plain / 4, normalised / 4)
    assert 0 < plain < normalised  # each rule decides something here
    p = plain / 4
    assert found["accuracy_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 3))
    rows = [([256, *b"a pet cat"], 4), ([256, *b"x do"], 3)]
    scores = choices.log_likelihoods(model, rows, 64)
    assert scores == pytest.approx([model.score("a pet", "cat"), model.score("x", "do")], rel=1e-5)
    cut = choices.log_likelihoods(model, rows, 2)  # the window holds the last two transitions
    assert cut[0] == pytest.approx(float(model.table[ord("c"), ord("a")] +
                                         model.table[ord("a"), ord("t")]), rel=1e-5)  # fmt: skip


def test_published_layouts(tmp_path):
    def parsed(name, *rows):
        (tmp_path / name).write_text("\n".join(json.dumps(r) for r in rows))
        return choices.read(tmp_path / name)

    (q,) = parsed("hellaswag_val.jsonl", {
        "ind": 24, "activity_label": "Roof repair", "ctx_a": "A man is on a roof.", "ctx_b": "he",
        "ctx": "A man is on a roof. he", "split": "val", "split_type": "indomain", "label": 3,
        "endings": ["sits.", "sings.", "runs [title] off  now [step] there.", "starts."],
        "source_id": "x"})  # fmt: skip
    assert q.context == "Roof repair: A man is on a roof. He" and q.answer == 3
    assert q.choices[2] == "runs. off now there."
    stem = {"stem": "Which is hot?", "choices": [{"text": "ice", "label": "A"},
                                                 {"text": "fire", "label": "B"}]}  # fmt: skip
    flat = {"question": "Which is hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}}
    a, b = parsed("ARC-Easy-Test.jsonl", {"id": "x", "question": stem, "answerKey": "B"},
                  {**flat, "answerKey": "2"})  # fmt: skip
    expected = choices.Question("Question: Which is hot?\nAnswer:", ["ice", "fire"], 1)
    assert a == b == expected
    own = {"choices": ["ice", "fire"], "answer": 1}
    c, d = parsed("own.jsonl", {"question": "Which is hot?", **own}, {"context": "x", **own})
    assert c == expected and d.context == "x"
    (tmp_path / "valid-labels.lst").write_text("1\n0\n")
    piqa = [{"goal": f"open a jar {i}", "sol1": "hit it", "sol2": "turn it"} for i in (0, 1)]
    found = parsed("valid.jsonl", *piqa)
    assert [q.answer for q in found] == [1, 0]
    assert found[0].context == "Question: open a jar 0\nAnswer:"
    assert found[0].choices == ["hit it", "turn it"]
    (q,) = parsed("hub.jsonl", {**piqa[0], "label": 0})
    assert q.answer == 0
    with pytest.raises(DataError, match="line 1"):
        parsed("unlabelled.jsonl", piqa[0])
    for answers, count in (("1\n", 1), ("1\n0\n1\n", 3)):
        (tmp_path / "valid-labels.lst").write_text(answers)
        with pytest.raises(DataError, match=rf"valid-labels\.lst: {count} answers to 2 questions"):
            parsed("valid.jsonl", *piqa)


def test_a_run_answers_questions(trained, tmp_path, capsys):
    line = {"context": "the cat", "choices": ["sat", "q\u2028\u0085q"], "answer": 0}
    lines = (json.dumps(line, ensure_ascii=False) + "\n") * 3
    (tmp_path / "q.jsonl").write_text(lines, encoding="utf-8")
    assert cli.main(["evaluate", str(trained), "--choices", str(tmp_path / "q.jsonl")]) == 0
    assert "accuracy 1.0000 ± 0.0000, length-normalised 1.0000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "result",
    [3, {"set": "a"}, {"set": ["a"], "loss": 1.0}, {"set": "a", "loss": "1"},
     {"set": "a", "loss": 10**400}, {"set": "a", "accuracy": 0.5, "window": [3]},
     {"set": "a", "loss": 1.0, "path": ["b"]}],
)  # fmt: skip
def test_a_result_that_no_evaluation_wrote_is_refused(result, tmp_path):
    (tmp_path / "evaluations.json").write_text(json.dumps({"results": [result]}))
    with pytest.raises(CheckpointError, match=r"evaluations\.json"):
        judge.kept(tmp_path / "evaluations.json")

"""Sampling: greedy with a cache equals full recomputation, seeds decide, filters keep what they
should, and characters come out whole."""

import pytest
import torch

from nanonormuon import sample
from nanonormuon.model import GPT, GPTConfig
from nanonormuon.pretrained import models
from nanonormuon.text import tokenizer


@pytest.fixture(scope="module")
def model():
    gpt = GPT(GPTConfig(vocab_size=64, n_layer=2, n_head=2, n_embd=16)).init_weights(0).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return gpt


def stream(model, byte, prompt, max_tokens, stops=(), **settings):
    """The printable pieces of a single row."""
    rows = [sample.Text(byte, stops)]
    written = sample.write(model, rows, prompt, max_tokens, **settings)
    return [piece for (piece,) in written if piece]


def test_greedy_with_a_cache_equals_full_recomputation(model):
    torch.manual_seed(0)
    prompt = torch.randint(64, (3, 5))
    found = torch.stack(list(sample.generate(model, prompt, 12, temperature=0)), 1)
    tokens = prompt
    for _ in range(12):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, tokens[:, 5:])


def test_the_seed_decides(model):
    prompt = torch.randint(64, (1, 4))
    a, b, c = ([int(t) for t in sample.generate(model, prompt, 30, seed=s)] for s in (1, 1, 2))
    assert a == b != c


def test_filters():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).repeat(4000, 1)
    random = [torch.Generator().manual_seed(0)] * 4000

    def shares(temperature, top_k, top_p):
        drawn = sample.draw(logits, temperature, top_k, top_p, random)
        return torch.bincount(drawn, minlength=4) / 4000

    p = torch.tensor([3.0, 2.0, 1.0, 0.0]).softmax(0)
    assert torch.allclose(shares(1, 0, 1), p, atol=0.03)
    assert torch.allclose(shares(0.5, 0, 1), (p**2) / (p**2).sum(), atol=0.03)
    assert torch.allclose(
        shares(1, 2, 1), torch.cat([p[:2] / p[:2].sum(), p.new_zeros(2)]), atol=0.03
    )
    assert shares(1e-40, 0, 1).tolist() == [1, 0, 0, 0]
    assert shares(1, 0, 0.5).tolist() == [1, 0, 0, 0]  # the first token alone has 0.64
    assert (shares(1, 0, 0.7) > 0).tolist() == [True, True, False, False]
    assert shares(0, 0, 1).tolist() == [1, 0, 0, 0]


def test_characters_spread_over_tokens_come_out_whole(monkeypatch):
    byte = tokenizer.get("byte")
    text = "né 東🎉!"
    ids = [*text.encode(), 0xFF, ord("x"), 0xE6, byte.eot, ord("y")]  # 0xE6 begins a character
    monkeypatch.setattr(sample, "generate", lambda *a, **k: (torch.tensor([i]) for i in ids))
    pieces = stream(None, byte, "", 99)
    assert "".join(pieces) == text + "\ufffdx\ufffd"
    assert "東" in pieces and "🎉" in pieces


def test_a_token_that_ends_inside_a_character(monkeypatch):
    """As byte-level BPE makes them: one whole character and the first byte of the next."""
    byte = tokenizer.get("byte")
    parts = {0: "的".encode() + b"\xe4", 1: b"\xb8\xad", 2: b"!"}
    monkeypatch.setattr(
        tokenizer.Tokenizer, "decode_bytes", lambda self, ids: b"".join(parts[i] for i in ids)
    )
    monkeypatch.setattr(sample, "generate", lambda *a, **k: (torch.tensor([i]) for i in range(3)))
    assert stream(None, byte, "", 3) == ["的", "中", "!"]


def test_an_id_without_a_token_ends_the_text(monkeypatch):
    byte, ids = tokenizer.get("byte"), (65, 300, 66)
    monkeypatch.setattr(sample, "generate", lambda *a, **k: (torch.tensor([i]) for i in ids))
    assert stream(None, byte, "", 3) == ["A"]


def test_beyond_its_context_the_model_sees_the_younger_half(model):
    prompt = torch.randint(64, (2, 5))
    found = torch.stack(list(sample.generate(model, prompt, 20, temperature=0, context=8)), 1)
    seen, start = prompt, 0
    for _ in range(20):
        if seen.size(1) - start > 8:
            start = seen.size(1) - 4
        with torch.no_grad():
            seen = torch.cat([seen, model(seen[:, start:])[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, seen[:, 5:])
    long = list(sample.generate(model, torch.randint(64, (1, 30)), 3, context=8))
    assert len(long) == 3


def spelt(text, stops, piece=1):
    """What comes out of a text given byte by byte, and whether it ended by itself."""
    rows = sample.Text(tokenizer.get("byte"), stops)
    pieces = [rows.add(b) for b in text.encode()]
    assert all(p == "" for p in pieces[rows.tokens :])
    ended = rows.ended
    return "".join(pieces) + rows.add(None), ended


@pytest.mark.parametrize(
    ("text", "stops", "expected", "ended"),
    [
        ("to be or not", ["or"], "to be ", True),
        ("to be or not", ["nor"], "to be or not", False),
        ("ababac", ["abac"], "ab", True),
        ("a\n\nb", ["\n\n", "zz"], "a", True),
        ("one two", ["two", "one two three"], "one ", True),
        ("one two th", ["two three"], "one two th", False),
        ("né東x", ["東"], "né", True),
        ("abc", ["", "c"], "ab", True),
    ],
)
def test_stop_strings(text, stops, expected, ended):
    assert spelt(text, stops) == (expected, ended)


def test_nothing_of_a_stop_string_is_printed_before_it_is_ruled_out():
    rows = sample.Text(tokenizer.get("byte"), ["END."])
    assert [rows.add(b) for b in b"xENDyEND."] == ["x", "", "", "", "ENDy", "", "", "", ""]
    assert rows.ended and rows.add(None) == ""


def test_the_first_of_several_stop_strings_in_one_token_counts(monkeypatch):
    byte = tokenizer.get("byte")
    monkeypatch.setattr(
        tokenizer.Tokenizer, "decode_bytes", lambda self, ids: b"a STOP b END c" * len(ids)
    )
    for stops in (["END", "STOP"], ["STOP", "END"]):
        assert sample.Text(byte, stops).add(0) == "a "


def test_a_batch_gives_what_each_sample_gives_alone(trained):
    model, byte, _ = models.load_run(trained, torch.float32, torch.device("cpu"))
    rows = [sample.Text(byte, ["bird"]) for _ in range(4)]
    texts = [""] * 4
    for pieces in sample.write(model, rows, "the", 60, seed=7):
        texts = [a + b for a, b in zip(texts, pieces)]
    for i, text in enumerate(texts):
        alone = stream(model, byte, "the", 60, ["bird"], seed=7 + i)
        assert text == "".join(alone) and "bird" not in text
    assert len(set(texts)) > 1

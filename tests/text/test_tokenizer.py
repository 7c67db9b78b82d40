"""Proves: any bytes survive encode and decode; our ids are those of tiktoken, Hugging Face
tokenizers and transformers reading the saved files; training is deterministic and exact in size;
damaged, missing and misspelt tokenizers are refused without touching the network or a file.
"""

import copy
import functools
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanonormuon.errors import CheckpointError, MissingPackage, TokenizerError, exit_code
from nanonormuon.pretrained import models
from nanonormuon.text import bpe as bpe_module
from nanonormuon.text import builtin, encode
from nanonormuon.text import tokenizer as module
from nanonormuon.text.bpe import BPE, CL100K, EOT, GPT2, O200K, PATTERN, Tokenizer
from nanonormuon.text.prepare import prepare

SHARED = Path(__file__).parents[3] / "shared"
CACHE = SHARED / "tiktoken_cache"
GPT2_FILE = "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"  # sha1 of the address, as tiktoken names it
SHAKESPEARE = "10ca660f84c20b4916bd46a343cfbe9e39846a1c6e2a8c645d04a7438a341e3d"  # of bpe:512
ADVERSARIAL = [
    "",
    " ",
    "Hello, world!  It's   2024-01-31,\tI'LL say: don't\n",
    "a \r\n\r\n b\r\r\n\n   \n\tc  \n",
    "trailing   ",
    "trailing\r\n\xa0",
    "1234567890 ١٢٣ ½ ² 12a34",
    "e\u0301 e\u0301\u0301 \u0301 \u0915\u094d\u0937 \ufeff\u200b",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea!!! ...///\n/",
    "\0\0a\0 \x85\x1c\x1d\u2028\u2029\xa0\u3000",
    f"{EOT}x{EOT} <|endoftext <|im_start|>",
    "'s'S'\u017f'LL'll 'Re ǅ ß ẞ İ",
    "x" * 3000 + " " * 3000 + "\n" * 300 + "y",
    "日本語のテキスト。한국어 текст עברית العربية",
]
ALPHABET = st.sampled_from([*" \n\r\t'sdlLvetmrE1½!/._-\u017f\u0301ǅ字\xa0\x00\x85", "  ", EOT])
TEXTS = st.one_of(st.text(max_size=40), st.lists(ALPHABET, max_size=30).map("".join))


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return module.get(
        "bpe:1000", [p.read_bytes() for p in sorted(Path(os.__file__).parent.glob("[a-d]*.py"))]
    )


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    if not CACHE.is_dir():
        pytest.skip(f"needs {CACHE}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
        return module.get("gpt2")


@pytest.fixture(params=["byte", "bpe", pytest.param("gpt2", marks=pytest.mark.slow)])
def each(request: pytest.FixtureRequest) -> Tokenizer:
    return module.get("byte") if request.param == "byte" else request.getfixturevalue(request.param)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def test_byte_ids() -> None:
    byte = module.get("byte")
    assert (byte.vocab_size, byte.eot, byte.name) == (257, 256, "byte")
    assert byte.encode("aé\0") == [97, 195, 169, 0]
    assert byte.decode([104, 105, 256]) == "hi<|endoftext|>"


def test_arbitrary_bytes_come_back(each: Tokenizer) -> None:
    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.one_of(st.binary(max_size=12), st.text(max_size=8).map(str.encode))))
    def check(parts: list[bytes]) -> None:
        data = b"".join(parts)
        assert each.decode_bytes(each.encode(data)) == data

    check()


def test_invalid_utf8_is_single_bytes_between_normal_tokens(bpe: Tokenizer) -> None:
    expected = [*bpe.encode(" import"), 0xFF, 0xE2, 0x82, *bpe.encode(" self")]
    assert bpe.encode(b" import\xff\xe2\x82 self") == expected
    assert bpe.decode(expected) == " import\ufffd\ufffd self"


def test_lone_surrogates_stand_for_their_three_bytes(each: Tokenizer) -> None:
    text = "a\ud800b\udc80\udcffc\ud83d\ude00"
    assert each.decode_bytes(each.encode(text)) == text.encode("utf-8", "surrogatepass")


def test_special_token_in_text_is_ordinary_text(each: Tokenizer) -> None:
    ids = each.encode(f"a{EOT}b")
    assert each.eot not in ids and len(ids) > 3
    assert each.decode(ids) == f"a{EOT}b"


def test_a_job_is_each_text_alone(each: Tokenizer) -> None:
    texts = [*ADVERSARIAL, b"\xff\xfe", "\ud800", *(t.encode() for t in ADVERSARIAL)]
    job = [part for text in texts for part in (None, *each.cut(text, ""))]
    ids = each.encode_job(job)
    assert ids.dtype == np.uint32
    assert ids.tolist() == [i for text in texts for i in (each.eot, *each.encode(text))]


def test_gpt2_is_tiktokens(gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    theirs = tiktoken.get_encoding("gpt2")
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256) == (theirs.n_vocab, theirs.eot_token)
    assert gpt2.encode("Hello world") == [15496, 995]
    for text in ADVERSARIAL:
        assert gpt2.encode(text) == theirs.encode_ordinary(text)


@pytest.mark.parametrize("size", [5, bpe_module.PIECE])
def test_long_text_in_pieces_has_the_ids_of_the_whole(
    gpt2: Tokenizer, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bpe_module, "PIECE", size)
    random.seed(1)
    parts = ["word", " a", "\n", "\n", "\n\n", "  ", "/x", "!", "!\n/", "\r\n", "12", "é", "\n字"]
    text = "".join(random.choices(parts, k=3 * size // 2 + 20_000))
    for pattern in (PATTERN, GPT2, CL100K, O200K):
        tokens = [*gpt2.ranks, b"\n/"]  # the last shows where o200k_base has no boundary
        one = BPE("t", pattern, tokens, 50257)
        assert one.encode(text) == one._encoding.encode_ordinary(text)
    assert len(list(bpe_module.pieces(text))) >= 2
    assert "".join(bpe_module.pieces(text)) == text


@pytest.mark.parametrize("text", [" " * 1_000_000 + "x", "\n" * 1_000_000 + "x", "é" * 300_000])
def test_a_million_of_one_character(gpt2: Tokenizer, text: str) -> None:
    assert gpt2.decode(gpt2.encode(text)) == text


# What tiktoken 0.14 uses for these two; ours say the same without possessive quantifiers.
POSSESSIVE = {
    GPT2: r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    CL100K: r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
}


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(PATTERN, id="bpe"),
        pytest.param(GPT2, id="gpt2", marks=pytest.mark.slow),
        pytest.param(CL100K, id="cl100k_base"),
        pytest.param(O200K, id="o200k_base", marks=pytest.mark.slow),
    ],
)
def test_split_agrees_with_tiktoken_and_hugging_face(
    pattern: str, gpt2: Tokenizer, tmp_path: Path
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    ours = BPE("t", pattern, gpt2.ranks, gpt2.eot)
    published = BPE("t", POSSESSIVE.get(pattern, pattern), gpt2.ranks, gpt2.eot)
    ours.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / module.FILE))
    theirs.encode_special_tokens = True  # that is: as text

    @settings(max_examples=300, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        assert theirs.encode(text).ids == ours.encode(text) == published.encode(text)
        assert theirs.decode(ours.encode(text), skip_special_tokens=False) == text

    check()
    for text in ADVERSARIAL:
        assert theirs.encode(text).ids == ours.encode(text) == published.encode(text)


def test_saved_tokenizer_in_transformers(each: Tokenizer, tmp_path: Path, offline: None) -> None:
    transformers = pytest.importorskip("transformers")
    each.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (len(theirs), theirs.eos_token_id) == (each.vocab_size, each.eot)
    for text in [*ADVERSARIAL, "a , b . n't  x"]:
        ids = each.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text


def test_save_and_load(each: Tokenizer, tmp_path: Path) -> None:
    each.save(tmp_path / "a")
    each.save(tmp_path / "b")
    for name in (module.FILE, module.CONFIG):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [module.FILE, module.CONFIG]
    for path in (tmp_path / "a", tmp_path / "a" / module.FILE):
        loaded = module.get(path)
        assert (loaded.name, loaded.hash, loaded.eot) == (each.name, each.hash, each.eot)
        assert loaded.encode(ADVERSARIAL[2]) == each.encode(ADVERSARIAL[2])
    again = tmp_path / "a" / module.FILE
    again.write_text(json.dumps(json.loads(again.read_text()), indent=4))
    assert module.load(again).hash == each.hash, "the hash is of the content, not the formatting"


def test_hash_depends_on_each_part(bpe: Tokenizer) -> None:
    tokens = list(bpe.ranks)
    swapped = [*tokens[:65], b"B", b"A", *tokens[67:]]
    variants = [
        BPE("x", bpe.pattern, tokens, bpe.eot + 1),
        BPE("x", GPT2, tokens, bpe.eot),
        BPE("x", bpe.pattern, swapped, bpe.eot),
    ]
    assert len({t.hash for t in [bpe, *variants]}) == 4
    assert BPE("other name", bpe.pattern, tokens, bpe.eot).hash == bpe.hash


def test_every_letter_of_the_saved_file_counts(tmp_path: Path) -> None:
    tiny = module.get("bpe:260", ["abababab cdcdcd"])
    tiny.save(tmp_path)
    path = tmp_path / module.FILE
    content = path.read_bytes()
    rng = random.Random(0)
    for _ in range(400):
        i = rng.randrange(len(content))
        byte = rng.choice(b'01279abxyz"{}[],: \\\x00\xff')
        changed = content[:i] + bytes([byte]) + content[i + 1 :]
        path.write_bytes(changed)
        try:
            loaded = module.load(path)
        except TokenizerError as error:
            assert str(path) in str(error)
        else:  # white space
            assert json.loads(changed) == json.loads(content) and loaded.hash == tiny.hash


def saved(folder: Path, pattern: str = PATTERN, **config: Any) -> Path:
    """A tokenizer.json of ours, and tokenizer_config.json without a hash, as it used to be."""
    tiny = module.get("bpe:300", ["abababab cdcdcd year"])
    tiny.pattern = pattern
    tiny.save(folder)
    file = folder / module.CONFIG
    content = json.loads(file.read_text())
    del content["nanonormuon_hash"]
    file.write_text(json.dumps(content | config))
    return folder / module.FILE


LOSSES = {  # a regex, a text, where it is refused and why
    "letters": (PATTERN.replace("{N}{1,2}", "{L}{1,2}"), "year 1234 and", 5, "b'1234 and'"),
    "nothing": ("(a+)+$", "a" * 4000 + "b", 0, "loses text"),
    "limit": (r"(a|a)*\1b", "a" * 40 + "c", 0, "backtracking"),
    "panic": ("(?=b)", "aab", 0, "tokenizer bpe"),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_regex_that_drops_text_is_refused_with_its_place(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern, text, offset, reason = LOSSES[kind]
    ours = module.load(saved(tmp_path, pattern))
    with pytest.raises(TokenizerError, match=rf"^offset {offset}: ") as caught:
        ours.encode(text)
    assert reason in str(caught.value) and str(tmp_path / module.FILE) in str(caught.value)
    if kind == "letters":  # with the document, in the middle of one that several jobs encode
        monkeypatch.setattr(encode, "JOB_SIZE", 50)
        monkeypatch.setattr(bpe_module, "PIECE", 20)
        for i, before in enumerate(("", "é word\n" * 30)):
            (tmp_path / "fine.txt").write_text("\xff fine\n" * i)
            (tmp_path / "x.txt").write_text(f"{before}year 1234 and\n")
            (tmp_path / "y.txt").write_text("later\n")
            place = rf"x\.txt: offset {5 + len(before.encode())}: "
            with pytest.raises(TokenizerError, match=place):
                texts = [tmp_path / name for name in ("fine.txt", "x.txt", "y.txt")[1 - i :]]
                prepare(texts, tmp_path / "out", tmp_path / module.FILE, val=0.001)


def test_the_hash_beside_a_saved_tokenizer(each: Tokenizer, tmp_path: Path) -> None:
    each.save(tmp_path)
    file = tmp_path / module.CONFIG
    content = json.loads(file.read_text())
    assert content["nanonormuon_hash"] == each.hash
    content["nanonormuon_hash"] = "0" * 64
    file.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=rf"{each.hash}, expected 0000.*{module.CONFIG}"):
        module.load(tmp_path)
    del content["nanonormuon_hash"]  # as older versions wrote it
    file.write_text(json.dumps(content))
    assert module.load(tmp_path).hash == each.hash


UNUSUAL: list[Any] = [None, True, -1, 10**12, 10**400, 1.5, float("nan"), float("inf"), "", "("]
UNUSUAL += ["\ud800", "a" * 5000, "(a+)+$", "a\x1b[31m\nb", [], {}, [[]], {"x": 1}, ["a", "a"]]
PLACES = [
    *("model", "model.vocab", "model.vocab.a", "model.merges", "model.merges.0", "model.type"),
    *("added_tokens", "added_tokens.0", "added_tokens.0.id", "added_tokens.0.content"),
    *("pre_tokenizer", "pre_tokenizer.pretokenizers.0.pattern.Regex", "normalizer", "decoder"),
    *("model.continuing_subword_prefix", "model.unk_token", "truncation", "post_processor", ""),
]
CONFIG_PLACES = ["", "nanonormuon_name", "nanonormuon_hash", "eos_token", "nanonormuon_foreign"]


def changed(content: Any, place: str, value: Any) -> Any:
    """With a value put in its place, which may be missing."""
    first, _, rest = place.partition(".")
    if not place:
        return value
    key = int(first) if isinstance(content, list) else first
    try:
        old = content[key]
    except (LookupError, TypeError):
        return content
    content[key] = changed(old, rest, value)
    return content


@pytest.mark.parametrize(
    ("kind", "step"),
    [
        *(("ours", 9), ("split", 9)),
        *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in ("ours", "split", "llama2")),
    ],
)
def test_no_value_in_a_tokenizer_is_a_fault_of_the_program(
    kind: str, step: int, tmp_path: Path
) -> None:
    path = saved(tmp_path) if kind == "ours" else trained(kind, tmp_path)[0]
    (tmp_path / module.CONFIG).touch()
    config = json.loads((tmp_path / module.CONFIG).read_bytes() or b"{}")
    content, cases = json.loads(path.read_bytes()), [(module.FILE, place) for place in PLACES]
    cases += [(module.CONFIG, place) for place in CONFIG_PLACES]
    for (file, place), value in list(itertools.product(cases, UNUSUAL))[::step]:
        new = {module.FILE: copy.deepcopy(content), module.CONFIG: dict(config)}
        if place in CONFIG_PLACES[1:]:
            new[file][place] = value
        else:
            new[file] = changed(new[file], place, value)
        for name, data in new.items():
            (tmp_path / name).write_text(json.dumps(data))
        try:
            found = module.load(path)
            found.files()
            text = found.decode(found.encode("year a"))
        except Exception as error:
            assert exit_code(error), (file, place, value, repr(error))
        else:
            assert re.sub(r"[ \u2581]", "", text).endswith("yeara"), (file, place, value)


@pytest.mark.parametrize("name", [module.FILE, module.CONFIG, GPT2_FILE])
@pytest.mark.parametrize("kind", ["pipe", "device", "huge", "itself"])
def test_files_that_are_no_files(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "huge":
        path.touch()
        os.truncate(path, 1 << 40)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises((TokenizerError, OSError), match=name) as caught:
        module.get("gpt2" if name == GPT2_FILE else tmp_path)
    assert "damaged" not in str(caught.value) and str(caught.value).count(str(path)) == 1


def test_tokens_of_one_long_run_are_capped() -> None:
    block = "".join(random.Random(0).choices("abcdefgh", k=700))
    for text in ("b" * 50_000, "x" + " " * 50_000, ".\n" * 20_000, f"{block} " * 40):
        ours = module.get("bpe:1100", [text])
        assert max(map(len, ours.ranks)) <= bpe_module.LONGEST
        assert ours.decode(ours.encode(text)) == text
    text = (" " * 60_000 + "x") * 4  # cut in linear time
    assert "".join(bpe_module.pieces(text)) == text


def test_vocabularies_of_ordinary_text_stay_the_same() -> None:
    file = SHARED / "data" / "tinyshakespeare.txt"
    if not file.exists():
        pytest.skip(f"needs {file}")
    found = module.get("bpe:512", [file.read_bytes()[:300_000]]).files()[module.FILE]
    assert hashlib.sha256(found).hexdigest() == SHAKESPEARE


@pytest.mark.slow
def test_the_demos_vocabulary_is_that_of_uncut_text(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = [d.data for d in builtin.python_sources()]
    found = module.get("bpe:4096", corpus).hash
    monkeypatch.setattr(bpe_module, "LONGEST", 1 << 30)
    assert module.get("bpe:4096", corpus).hash == found


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "null", "[" * 100_000, '{"added_tokens": []}', "\xff", '{"added_tokens": 3}'],
)
def test_damaged_files_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / module.FILE).write_text(content, encoding="latin-1")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: damaged"):
        module.load(tmp_path)
    with pytest.raises(TokenizerError, match="no such file"):
        module.load(tmp_path / "nothing")


def test_merges_that_contradict_the_vocabulary_are_refused(tmp_path: Path) -> None:
    module.get("bpe:260", ["abababab cdcdcd"]).save(tmp_path)
    path = tmp_path / module.FILE
    content = json.loads(path.read_text())
    content["model"]["merges"].reverse()
    path.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="do not match its vocabulary"):
        module.load(path)
    with pytest.raises(TokenizerError, match="union of two earlier"):
        tokens = [*(bytes([b]) for b in range(256)), b"abc"]
        BPE("x", PATTERN, tokens, 257).save(tmp_path / "x")


@pytest.mark.parametrize("i", [5, 9999, "97", -1])
def test_ids_that_are_not_each_number_once_are_refused(i: Any, tmp_path: Path) -> None:
    module.get("bpe:260", ["abababab cdcdcd"]).save(tmp_path)
    path = tmp_path / module.FILE
    content = json.loads(path.read_text())
    content["model"]["vocab"]["a"] = i
    path.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=str(path)):
        module.load(path)


def trained(kind: str, folder: Path) -> tuple[Path, Any]:
    """A tokenizer.json that `tokenizers` itself trained and wrote, and its own reading of it."""
    (folder / module.FILE).write_text(written(kind), encoding="utf-8")
    theirs = pytest.importorskip("tokenizers").Tokenizer.from_str(written(kind))
    theirs.encode_special_tokens = True
    return folder / module.FILE, theirs


@functools.cache
def written(kind: str) -> str:
    """The tokenizer.json of one kind, trained once."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, normalizers, trainers
    from tokenizers import pre_tokenizers as pre

    special, alphabet = ["<|endoftext|>", "<|im_start|>"], pre.ByteLevel.alphabet()
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.decoder = decoders.ByteLevel()
    if kind == "gpt2":
        theirs.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    elif kind == "digits":  # as SmolLM: special tokens have the first ids
        theirs.pre_tokenizer = pre.Sequence(
            [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
        )
    elif kind in ("split", "nfc"):
        split = pre.Split(tokenizers.Regex(CL100K), "isolated")
        last = pre.ByteLevel(add_prefix_space=False, use_regex=False)
        theirs.pre_tokenizer = pre.Sequence([split, last])
        theirs.normalizer = normalizers.NFC() if kind == "nfc" else None
        special = ["</s>", "<pad>"]
    elif kind == "llama2":  # SentencePiece's BPE with bytes for what the vocabulary lacks
        theirs.model = models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        theirs.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        theirs.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
             decoders.Strip(" ", 1, 0)]
        )  # fmt: skip
        special, alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))], []
    elif kind == "unigram":
        theirs.model, theirs.pre_tokenizer = models.Unigram(), pre.Metaspace()
        theirs.decoder, alphabet = decoders.Metaspace(), []
        special = ["<unk>", "<s>", "</s>"]
    elif kind == "wordpiece":
        theirs.model, theirs.normalizer = (
            models.WordPiece(unk_token="[UNK]"),
            normalizers.BertNormalizer(),
        )
        theirs.pre_tokenizer, theirs.decoder = pre.BertPreTokenizer(), decoders.WordPiece()
        special, alphabet = ["[UNK]", "[CLS]", "[SEP]"], []
    texts = [p.read_text() for p in sorted(Path(os.__file__).parent.glob("[a-c]*.py"))]
    if kind in ("llama2", "unigram"):  # one would take a whole file for a word, one is slow
        texts = [line for text in texts for line in text.splitlines()][::20]
    made = {"BPE": trainers.BpeTrainer, "Unigram": trainers.UnigramTrainer,
            "WordPiece": trainers.WordPieceTrainer}[type(theirs.model).__name__]  # fmt: skip
    more = {"unk_token": "<unk>"} if kind == "unigram" else {}
    trainer = made(
        vocab_size=700,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=alphabet,
        **more,
    )
    theirs.train_from_iterator(texts, trainer)
    return theirs.to_str(pretty=True)


DROP = {"type": "Split", "pattern": {"Regex": r"\d+"}, "behavior": "Removed", "invert": False}
LSTRIP = {"id": 700, "content": "foo", "special": False, "single_word": False, "normalized": False,
          "lstrip": True, "rstrip": False}  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        *("gpt2", "nfc", "llama2", "wordpiece", "added", "unk"),
        pytest.param("unigram", marks=pytest.mark.slow),
    ],
)
def test_text_that_other_peoples_tokenizers_drop(kind: str, tmp_path: Path) -> None:
    path, _ = trained({"added": "gpt2", "unk": "wordpiece"}.get(kind, kind), tmp_path)
    content, text, offset = json.loads(path.read_text()), "do not 1234  foo", 7
    if kind == "added":
        content["added_tokens"].append(LSTRIP)
        offset = 11
    elif kind == "unk":
        content["model"]["unk_token"], text, offset = "nope", "a \U0001f469", 0
    else:
        steps = [DROP, content["pre_tokenizer"]]
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [s for s in steps if s]}
    assert module.load(path).encode(text)
    path.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=f"^offset {offset}: ") as caught:
        module.load(path).encode(text)
    assert str(path) in str(caught.value)


BYTE_LEVEL = ["gpt2", "digits", "split", "nfc"]
OTHERS = ["llama2", "unigram", "wordpiece"]
PLAIN = "def f(x):\n    return [x, '1 2'] # plain  text\n"


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_other_peoples_byte_level_bpe(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, theirs = trained(kind, tmp_path)
    ours = module.get(path)
    assert ours.vocab_size == theirs.get_vocab_size() == 700
    assert ours.eot == theirs.token_to_id("</s>" if kind in ("split", "nfc") else EOT)
    assert ours.eot == 0, "not the largest id"
    ours.encode("caf\u00e9")
    assert not caplog.text
    ours.encode("cafe\u0301")
    assert ("normalizer" in caplog.text) == (kind == "nfc")

    @settings(max_examples=200, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        same = unicodedata.normalize("NFC", text) if kind == "nfc" else text
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text)
        assert ours.decode(ours.encode(text)) == same

    check()
    for text in ADVERSARIAL:
        assert theirs.encode(text).ids == ours.encode(text), text
    assert ours.decode_bytes(ours.encode(b"a\xff\xfe")) == b"a\xff\xfe"
    assert ours.encode_job([None, *ours.cut("a", "")]).tolist() == [ours.eot, *ours.encode("a")]
    lengths = ours.lengths
    assert lengths[ours.eot] == 0 and lengths[ours.encode("a")[0]] == 1
    stream = ours.stream()
    assert [stream.add(i) for i in ours.encode("\u5b57".encode()[:2])] == ["", ""]
    assert stream.finish() == "\ufffd"
    with pytest.raises(TokenizerError, match="decode"):
        ours.decode([700])


@pytest.mark.parametrize(
    "kind", ["llama2", pytest.param("unigram", marks=pytest.mark.slow), "wordpiece"]
)
def test_other_kinds_of_tokenizer(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, theirs = trained(kind, tmp_path)
    ours = module.get(path)
    assert ours.vocab_size == theirs.get_vocab_size()
    assert ours.eot == theirs.token_to_id("[SEP]" if kind == "wordpiece" else "</s>")
    for text in [*ADVERSARIAL, PLAIN]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    if kind != "unigram":  # whose model lists special tokens among its ordinary ones
        assert ours.eot not in ours.encode(ours.end * 2)
    names = {"llama2": "", "unigram": "unknown characters", "wordpiece": "normalizer"}
    assert names[kind] in caplog.text and bool(names[kind]) == bool(caplog.text)
    if kind == "llama2":
        assert ours.decode(ours.encode(ADVERSARIAL[-1])) == ADVERSARIAL[-1]
        assert ours.decode_bytes(ours.encode(PLAIN)) == PLAIN.encode()
    assert ours.lengths is None
    assert "bits per byte" in caplog.text
    with pytest.raises(TokenizerError, match=r"offset 2: byte 0xff"):
        ours.encode(b"ab\xff")
    for wrong in (ours.vocab_size, -1, 1 << 40):
        with pytest.raises(TokenizerError, match="decode"):
            ours.decode([wrong])


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, *OTHERS])
def test_tokens_one_at_a_time_give_the_text_of_all(kind: str, tmp_path: Path) -> None:
    """With and without a prompt before them, at every place."""
    ours = module.get(trained(kind, tmp_path)[0])
    for text in (PLAIN, "one two\u5b57 three \U0001f469 x", ADVERSARIAL[2]):
        ids = ours.encode(text)
        for cut in range(len(ids)):
            stream = ours.stream([ours.eot, *ids[:cut]])
            pieces = [stream.add(i) for i in ids[cut:]] + [stream.finish()]
            expected = ours.decode(ids)
            before = ours.decode(ids[:cut])
            if not before.endswith("\ufffd"):
                assert before + "".join(pieces) == expected
        assert len(list(filter(None, pieces))) >= 1


@pytest.mark.parametrize(
    ("prompt", "then", "shown"),
    [
        ("abc\ufffd", b"de", ["d", "e", ""]),
        ("ab\udcff", b"de", ["d", "e", ""]),
        (b"ab\xff", b"\xffd\xff", ["", "\ufffdd", "", "\ufffd"]),
        (b"ab\xe5\xad", b"de", ["d", "e", ""]),
        (b"ab\xe5\xad", b"\x97de", ["", "d", "e", ""]),  # which complete a character
    ],
)
def test_nothing_of_a_prompt_is_repeated(prompt: Any, then: bytes, shown: list[str]) -> None:
    ours = module.get("byte")
    stream = ours.stream([ours.eot, *ours.encode(prompt)])
    assert [*map(stream.add, ours.encode(then)), stream.finish()] == shown


@pytest.mark.parametrize("kind", ["gpt2", "nfc", "llama2", "unigram"])
def test_a_copy_of_another_tokenizer(kind: str, tmp_path: Path) -> None:
    ours = module.get(trained(kind, tmp_path)[0])
    ours.save(tmp_path / "saved")
    again = module.load(tmp_path / "saved")
    assert (again.hash, again.name, again.eot) == (ours.hash, ours.name, ours.eot)
    assert again.encode(ADVERSARIAL[2]) == ours.encode(ADVERSARIAL[2])
    assert again.files() == ours.files()
    # the formula decides whether data prepared before can be opened
    parts = [json.loads((tmp_path / module.FILE).read_text()), ours.eot]
    assert ours.hash == hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("kind", ["gpt2", "unigram", "wordpiece"])
def test_the_data_and_a_model_must_have_the_same_ids(kind: str, tmp_path: Path) -> None:
    path, theirs = trained(kind, tmp_path)
    ours = module.get(path)
    models.check_tokenizer(tmp_path, ours)
    theirs.add_tokens(["one more"])
    theirs.save(str(path))
    models.check_tokenizer(tmp_path, ours)
    content = json.loads(path.read_text())
    if kind == "unigram":
        vocab = content["model"]["vocab"]
        vocab[500], vocab[501] = vocab[501], vocab[500]
    else:
        swapped = {500: 501, 501: 500}
        vocab = content["model"]["vocab"].items()
        content["model"]["vocab"] = {token: swapped.get(i, i) for token, i in vocab}
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: 2 of the data's .*: 50[01] in"):
        models.check_tokenizer(tmp_path, ours)
    path.write_text('{"model": {"vocab": [1]}}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer's vocabulary"):
        models.check_tokenizer(tmp_path, ours)


def test_truncation_and_padding_of_a_file_are_not_for_training(tmp_path: Path) -> None:
    path, theirs = trained("gpt2", tmp_path)
    expected = theirs.encode(PLAIN).ids
    theirs.enable_truncation(3)
    theirs.enable_padding(length=99)
    theirs.save(str(path))
    assert module.get(path).encode(PLAIN) == expected


@pytest.mark.slow
def test_gpt2_through_the_library_is_tiktokens(gpt2: Tokenizer, tmp_path: Path) -> None:
    """In the form of GPT-2's published tokenizer.json, on a large sample of text."""
    pytest.importorskip("tokenizers")
    content = gpt2.content
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    content["pre_tokenizer"] = content["decoder"] = byte_level
    (tmp_path / module.FILE).write_text(json.dumps(content))
    theirs = module.load(tmp_path)
    assert (theirs.vocab_size, theirs.eot, theirs.name) == (50257, 50256, tmp_path.name)
    texts = [d.data for d in builtin.python_sources()][::40]
    for text in [*texts, *ADVERSARIAL, b"\xff\xfe a", "\ud800"]:
        ids = theirs.encode(text)
        assert ids == gpt2.encode(text)
        assert theirs.decode_bytes(ids) == gpt2.decode_bytes(ids)
    assert (theirs.lengths == gpt2.lengths).all()


def test_llama_3s_way_to_list_every_pair(gpt2: Tokenizer, tmp_path: Path) -> None:
    """A vocabulary of tiktoken's converted by Hugging Face lists all pairs that make a token."""
    pytest.importorskip("tokenizers")
    small = list(gpt2.ranks)[:2000]
    ours = BPE("t", CL100K, small, 2000)
    content = ours.content
    chars = {token: "".join(bpe_module.CHARS[b] for b in token) for token in small}
    content["model"]["merges"] = [
        f"{chars[token[:k]]} {chars[token[k:]]}"
        for token in small[256:]
        for k in range(1, len(token))
        if token[:k] in small and token[k:] in small
    ]
    content["model"]["ignore_merges"] = True
    (tmp_path / module.FILE).write_text(json.dumps(content))
    theirs = module.load(tmp_path)
    for text in [*ADVERSARIAL, Path(os.__file__).read_text()]:
        assert theirs.encode(text) == ours.encode(text)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["model"].update(type="Unknown"), "damaged"),
        (lambda c: c.update(normalizer={"type": "Shuffle"}), "damaged"),
        (lambda c: c["model"].update(dropout=0.1), r"dropout = 0\.1"),
        (lambda c: c["added_tokens"].clear(), "no token that ends a text"),
        (lambda c: c["added_tokens"][0].update(content="<end>"), "no token .*<end>.*im_start"),
        (lambda c: c["model"]["vocab"].pop("a"), "damaged"),
        (lambda c: c["model"]["vocab"].update(a=5), "unique ids"),
        (lambda c: c["model"]["vocab"].update(a=-5), "unique ids from 0 to"),
        (lambda c: c["model"]["vocab"].update(a=1 << 40), "unique ids from 0 to"),
        (lambda c: c["model"].update(merges=7), "damaged"),
        (lambda c: c["model"].update(vocab=7), "damaged"),
    ],
)
def test_foreign_files_that_cannot_be_followed(change: Any, says: str, tmp_path: Path) -> None:
    path, _ = trained("gpt2", tmp_path)
    content = json.loads(path.read_text())
    content["model"]["vocab"].pop("<|endoftext|>")  # listed among the added tokens
    content["model"]["vocab"].pop("<|im_start|>")
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=says) as caught:
        module.get(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = trained("gpt2", tmp_path)
    module.get("bpe:260", ["abababab cdcdcd"]).save(tmp_path / "ours")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingPackage, match="pip install tokenizers"):
        module.get(path)
    assert module.get(tmp_path / "ours").vocab_size == 260


def test_a_published_file_anywhere(gpt2: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "vocab.bpe"
    shutil.copyfile(CACHE / GPT2_FILE, file)
    assert module.get(file).hash == gpt2.hash
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(TokenizerError, match=r"vocab\.bpe: damaged"):
        module.get(file)


def test_wikitext_is_tiktokens(gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken

    file = SHARED / "data" / "wikitext2-valid.txt"
    if not file.exists():
        pytest.skip(f"needs {file}")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    text = file.read_text()
    assert gpt2.encode(text) == tiktoken.get_encoding("gpt2").encode_ordinary(text)


@pytest.mark.slow
def test_10_000_strings_get_the_same_ids_from_tiktoken_and_tokenizers(tmp_path: Path) -> None:
    """bpe:4096 of the interpreter's sources; pieces of them, and strings of hard characters."""
    tokenizers = pytest.importorskip("tokenizers")
    corpus = [d.data for d in builtin.python_sources()][::8]
    ours = module.get("bpe:4096", corpus)
    ours.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / module.FILE))
    theirs.encode_special_tokens = True
    rng, joined = random.Random(0), b"".join(corpus).decode()
    hard = [
        *"\n\r\t  '0123456789½!._-/",
        "\u017f",
        "\u0301",
        "字",
        "é",
        "\U0001f469",
        EOT,
        "'LL",
        "\x00",
    ]
    texts = []
    for i in range(10_000):
        if i % 3 == 0:
            at = rng.randrange(len(joined))
            texts.append(joined[at : at + rng.randrange(200)])
        elif i % 3 == 1:
            texts.append("".join(rng.choices(hard, k=rng.randrange(40))))
        else:
            kinds = rng.choice([(0, 0x250), (0, 0x3000), (0xE000, 0x30000)])
            texts.append("".join(chr(rng.randrange(*kinds)) for _ in range(rng.randrange(30))))
    texts = [t.encode("utf-8", "ignore").decode() for t in texts]
    for text, found in zip(texts, theirs.encode_batch(texts), strict=True):
        assert found.ids == ours.encode(text) == ours._encoding.encode_ordinary(text), text


def test_training_size_and_order(bpe: Tokenizer) -> None:
    assert (bpe.vocab_size, bpe.eot, bpe.name, len(bpe.ranks)) == (1000, 999, "bpe:1000", 999)
    assert all(bpe.ranks[bytes([b])] == b for b in range(256))
    assert len(bpe.encode(" return self")) <= 3
    assert module.get("bpe:257", ["abc"]).vocab_size == 257


def test_training_is_the_same_on_any_number_of_threads() -> None:
    code = (
        "import os; from pathlib import Path; from nanonormuon.text import tokenizer;"
        "t = [p.read_bytes() for p in sorted(Path(os.__file__).parent.glob('[e-i]*.py'))];"
        "print(tokenizer.get('bpe:2000', t).hash)"
    )
    root = str(Path(__file__).parents[2])
    hashes = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"RAYON_NUM_THREADS": n, "PYTHONHASHSEED": n, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for n in ("1", "3")
    ]
    assert len(hashes[0]) == 65
    assert hashes[0] == hashes[1]


def test_too_little_text_gives_a_smaller_vocabulary(caplog: pytest.LogCaptureFixture) -> None:
    small = module.get("bpe:4096", ["hello hello hello"])
    assert small.vocab_size < 300 and small.name == f"bpe:{small.vocab_size}"
    assert small.eot == small.vocab_size - 1 == len(small.ranks)
    assert "not 4096" in caplog.text
    assert small.decode(small.encode("hello you")) == "hello you"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("gpt-2", "did you mean gpt2?"),
        ("cl100k", "did you mean cl100k_base?"),
        ("bytes", "did you mean byte?"),
        ("bpe4096", "did you mean bpe:4096?"),
        ("bpe", "did you mean bpe:4096?"),
        ("BPE:8192", "did you mean bpe:4096?"),
        ("bpe:-1", "did you mean bpe:4096?"),
        ("bpe:256", "expected 257"),
        ("bpe:10000000", "to 9999999"),
        ("bpe:4096", "expected a text"),
        ("no/such/path", "or an existing path"),
    ],
)
def test_bad_names(spec: str, says: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        module.get(spec)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert exit_code(caught.value) == 3


@pytest.mark.parametrize("name", list(module.PUBLISHED))
def test_missing_cache_file_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setenv("DATA_GYM_CACHE_DIR", str(tmp_path))
    with pytest.raises(
        TokenizerError, match=r"(?s)missing.*https://.*TIKTOKEN_CACHE_DIR"
    ) as caught:
        module.get(name)
    assert str(tmp_path) in str(caught.value)
    assert name != "gpt2" or GPT2_FILE in str(caught.value)


def test_damaged_cache_file_is_neither_used_nor_removed(
    gpt2: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    shutil.copy(CACHE / GPT2_FILE, tmp_path)
    file = tmp_path / GPT2_FILE
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    before = file.read_bytes()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(TokenizerError, match=r"damaged, .* expected sha256 1ce16"):
        module.get("gpt2")
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_unknown_ids_are_refused(each: Tokenizer) -> None:
    for wrong in (each.vocab_size, -1, 2**40):
        with pytest.raises(TokenizerError, match="decode"):
            each.decode([65, wrong])

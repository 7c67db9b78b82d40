"""Where tokenizers come from: a name, training, or a file.

`byte`; the published tiktoken encodings; BPE trained on a text; a saved tokenizer of ours; other
people's tokenizer.json.
"""

import base64
import difflib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanonormuon.errors import DataError, MissingPackage, TokenizerError
from nanonormuon.storage.files import read_file
from nanonormuon.text import bpe
from nanonormuon.text.bpe import BYTES, CL100K, CONFIG, EOT, FILE, GPT2, O200K, PATTERN, Tokenizer

__all__ = ["CONFIG", "EOT", "FILE", "PUBLISHED", "Tokenizer", "get", "load", "trained_size"]

MAX_IDS = 9_999_999  # of a trained vocabulary
DAMAGE = (LookupError, TypeError, ValueError, AttributeError, RecursionError)  # of a JSON file
# bytes: ten million ids take 0.6 GB of JSON; of tokenizer_config.json and the published files
LARGEST, LARGEST_OTHER = 1 << 30, 1 << 24


@dataclass(frozen=True)
class Published:
    """One of tiktoken's encodings."""

    address: str  # of the file with its tokens
    sha256: str  # of that file
    pattern: str
    eot: int

    def build(self, name: str, data: bytes) -> Tokenizer:
        """The tokenizer from the content of its file."""
        lines = data.decode().splitlines()
        if name == "gpt2":  # a list of merges, in the characters of CHARS, after a version line
            tokens = [bytes([b]) for b in bpe.BYTE_ORDER]
            tokens += [bytes(BYTES[c] for c in line if c != " ") for line in lines[1:]]
        else:  # "base64-of-token id" in order of id
            tokens = [base64.b64decode(line.split()[0]) for line in lines]
        return bpe.BPE(name, self.pattern, tokens, self.eot)


HOST = "https://openaipublic.blob.core.windows.net/"
PUBLISHED = {
    "gpt2": Published(
        HOST + "gpt-2/encodings/main/vocab.bpe",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        GPT2,
        50256,
    ),
    "cl100k_base": Published(
        HOST + "encodings/cl100k_base.tiktoken",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        CL100K,
        100257,
    ),
    "o200k_base": Published(
        HOST + "encodings/o200k_base.tiktoken",
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        O200K,
        199999,
    ),
}


def get(spec: str | Path, texts: Iterable[str | bytes] | None = None) -> Tokenizer:
    """The tokenizer that `spec` names.

    `byte`; `gpt2`, `cl100k_base`, `o200k_base` (from tiktoken's cache directory, never from the
    network); `bpe:N`, trained on `texts` to N ids; or a saved one's path. Raises TokenizerError.
    """
    spec = str(spec)
    if spec == "byte":
        return bpe.BPE("byte", PATTERN, [bytes([b]) for b in range(256)], 256)
    if spec in PUBLISHED:
        return _from_cache(spec)
    if size := trained_size(spec):
        if texts is None:
            raise TokenizerError(f"tokenizer {spec}: can only be trained, and no text is given")
        return bpe.train(size, texts)
    if Path(spec).exists():
        return load(spec)
    near = difflib.get_close_matches(spec, ["byte", *PUBLISHED], 1, cutoff=0.4)
    if match := re.fullmatch("bpe[^0-9]*([0-9]*)(k?).*", spec, re.IGNORECASE):
        size = int(f"0{match[1]}"[:9]) * (1024 if match[2] else 1)
        near = [f"bpe:{size if 257 <= size <= MAX_IDS else 4096}"]
    raise TokenizerError(
        f"tokenizer {spec!r}: neither byte, {', '.join(PUBLISHED)}, bpe:N nor an existing path"
        + (f"; did you mean {near[0]}?" if near else "")
    )


def trained_size(spec: str | Path) -> int | None:
    """N if `spec` is bpe:N, else None. Raises TokenizerError for an N that cannot be."""
    if not (match := re.fullmatch("bpe:([0-9]+)", str(spec))):
        return None
    if len(match[1]) > len(str(MAX_IDS)) or not 257 <= int(match[1]) <= MAX_IDS:
        raise TokenizerError(
            f"tokenizer {spec}: needs at least 257 ids, 256 bytes + {EOT}, and at most {MAX_IDS}"
        )
    return int(match[1])


def load(path: str | Path) -> Tokenizer:
    """Read a tokenizer: a tokenizer.json or the directory that holds it, or a published vocabulary
    file (vocab.bpe, *.tiktoken), known by its sha256.

    A file that `BPE.save` wrote must equal what it would write for the table in it, so a changed
    letter anywhere is refused; any other goes to the `tokenizers` library. Either must have the
    hash in tokenizer_config.json, if there is one. Raises TokenizerError, OSError.
    """
    path = Path(path, FILE) if Path(path).is_dir() else Path(path)
    try:
        data, config = read_file(path, LARGEST), {}
        found = hashlib.sha256(data).hexdigest()
        for name, published in PUBLISHED.items():
            if published.sha256 == found:
                return published.build(name, data)
        with suppress(FileNotFoundError):
            config = json.loads(read_file(path.with_name(CONFIG), LARGEST_OTHER))
        found = _read(json.loads(data), config, path)
        expected = config.get("nanonormuon_hash", found.hash)
        if found.hash != expected:
            raise TokenizerError(
                f"hash {found.hash}, expected {expected} ({CONFIG}); restore the file"
            )
        # it goes into messages and files
        found.name = "".join(c if c.isprintable() else "?" for c in found.name)
        found.path = path
        return found
    except FileNotFoundError:
        raise TokenizerError(f"{path}: no such file; expected a saved {FILE}") from None
    except MissingPackage:
        raise
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from None
    except DataError as error:  # of read_file, which names the file
        raise TokenizerError(str(error)) from None
    except DAMAGE as error:
        problem = f"{type(error).__name__}: {str(error)[:200]}"
        raise TokenizerError(f"{path}: damaged, or of an unknown kind ({problem})") from None


def _read(content: Any, config: Any, path: Path) -> Tokenizer:
    """The tokenizer in the content of a tokenizer.json and the tokenizer_config.json beside it."""
    if "nanonormuon_foreign" not in config:
        # without a mark the file may be of either kind
        with suppress(*() if "nanonormuon_name" in config else DAMAGE):
            return bpe.read(content, str(config.get("nanonormuon_name", "custom")))
    from nanonormuon.text import huggingface  # most runs do without it

    return huggingface.read(content, config, path)


def _from_cache(name: str) -> Tokenizer:
    """Build a published encoding from tiktoken's cache file, which is read here because tiktoken
    would delete one with a wrong checksum and download it again."""
    published = PUBLISHED[name]
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    path = Path(cache or Path(tempfile.gettempdir(), "data-gym-cache"))
    path = path / hashlib.sha1(published.address.encode()).hexdigest()
    try:
        data = read_file(path, LARGEST_OTHER)
    except FileNotFoundError:
        raise TokenizerError(
            f"tokenizer {name}: {path} is not there and nothing is downloaded here; save"
            f" {published.address} under that name (set TIKTOKEN_CACHE_DIR to use another"
            " directory), or anywhere, and give its path"
        ) from None
    except ValueError as error:
        raise TokenizerError(f"tokenizer {name}: {error}") from None
    if (found := hashlib.sha256(data).hexdigest()) != published.sha256:
        raise TokenizerError(
            f"tokenizer {name}: {path} is damaged, sha256 {published.sha256} expected, {found}"
            f" found; save {published.address} there anew"
        )
    return published.build(name, data)

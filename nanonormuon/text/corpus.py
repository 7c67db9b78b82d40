"""A configuration's corpus: directories of shards and their common tokenizer."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from nanonormuon.config import Config
from nanonormuon.errors import ConfigError, DataError, TokenizerError
from nanonormuon.runtime import distributed
from nanonormuon.runtime.distributed import World
from nanonormuon.storage.shards import MANIFEST, Data, open_data
from nanonormuon.storage.values import mixture
from nanonormuon.text.tokenizer import Tokenizer
from nanonormuon.text.tokenizer import get as get_tokenizer
from nanonormuon.text.tokenizer import load as load_tokenizer

log = logging.getLogger(__name__)
COMPRESSED = 2_000_000  # tokens at most, for which xz takes some seconds


def open_corpus(config: Config, world: World) -> tuple[Data, Tokenizer | None]:
    """Open a run's data, with data.mix, and their tokenizer, None if unknown."""
    path = Path(config.data.path)
    if config.data.path.startswith("builtin:"):
        from nanonormuon.text.builtin import builtin_data  # many runs do not need it

        names = config.data.path, config.data.tokenizer
        path = Path(distributed.first_does(lambda: str(builtin_data(*names))))
    data, tokenizer, problem = open_directory(config, path)
    if tokenizer is None and world.first:
        log.warning(f"no samples and no bits per byte, because data.tokenizer fails: {problem}")
    if share := config.data.tuning:
        data.train, data.val = data.train.cut(round((1 - share) * data.train.tokens))
        if min(data.train.tokens, data.val.tokens) < 2:
            left = f"leaves {data.train.tokens} tokens of {path} for training"
            rest = f"{data.val.tokens} for validation, expected at least 2 each"
            raise DataError(f"data.tuning = {share}: {left} and {rest}")
    mix(config, data, tokenizer)
    return data, tokenizer


def open_directory(config: Config, path: Path) -> tuple[Data, Tokenizer | None, str]:
    """Open a data directory; returns data, tokenizer (if any), and why there is none."""
    if (path / MANIFEST).exists() and config.data.format == "shards":
        data, tokenizer = open_data(path, None, config.data.verify), load_tokenizer(path)
        data.check_tokenizer(tokenizer)
        return data, tokenizer, ""
    try:
        tokenizer, problem = get_tokenizer(config.data.tokenizer), ""
    except TokenizerError as error:
        tokenizer, problem = None, str(error)
    vocab_size = config.model.vocab_size or (tokenizer.vocab_size if tokenizer else None)
    headerless = config.data.format == "nanogpt"
    return open_data(path, vocab_size, config.data.verify, headerless), tokenizer, problem


def mix(config: Config, data: Data, tokenizer: Tokenizer | None) -> None:
    """Add the training splits that data.mix names. Raises DataError for other tokenizers."""
    identity: list[Any] = [data.fingerprint]
    for name, share in mixture(config.data.mix):
        other, its, _ = open_directory(config, Path(name))
        if (its and its.hash) != (tokenizer and tokenizer.hash):
            found, expected = (words and words.hash[:12] for words in (its, tokenizer))
            problem = f"tokenizer {found}, expected that of {data.path}, {expected}"
            raise DataError(f"{name}: {problem}; prepare it with --tokenizer {data.path}")
        data.mix.append((other.train, share))
        identity.append([other.fingerprint, share])
    if data.mix:
        data.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def separator(config: Config, tokenizer: Tokenizer | None) -> int | None:
    """Return the token that attention does not cross, if any."""
    if not config.data.document_mask:
        return None
    if tokenizer is None:
        raise ConfigError("data.document_mask = true: expected a data.tokenizer")
    return tokenizer.eot


def compressors(config: Config, data: Data, tokenizer: Tokenizer | None) -> dict[str, float]:
    """Bits per byte that `gzip -9` and `xz` need for the validation text, or for the beginning of a
    long one, and its bytes; {} without a tokenizer."""
    if tokenizer is None:
        return {}
    import gzip  # once, after a run
    import lzma

    first, _ = data.val.cut(min(config.data.val_tokens or COMPRESSED, COMPRESSED))
    ids = np.concatenate(first.shards)
    text = tokenizer.decode_bytes(ids[~np.isin(ids, [*tokenizer.special_ids])].tolist())
    found = {"gzip_bpb": gzip.compress(text, 9), "xz_bpb": lzma.compress(text)}
    bits = {name: round(8 * len(z) / max(1, len(text)), 4) for name, z in found.items()}
    return bits | {"compressed_bytes": len(text)}

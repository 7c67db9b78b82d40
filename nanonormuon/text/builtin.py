"""The demo's text: the Python sources that come with an interpreter, prepared once and cached."""

import hashlib
import logging
import platform
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nanonormuon.errors import DataError, TokenizerError
from nanonormuon.storage import shards
from nanonormuon.storage.files import cache_directory
from nanonormuon.text.prepare import prepare_documents
from nanonormuon.text.sources import Document
from nanonormuon.text.tokenizer import PATTERN, load

log = logging.getLogger(__name__)
INSTALLED = {"site-packages", "dist-packages"}


def python_sources(roots: list[Path] | None = None, installed: bool = False) -> Iterator[Document]:
    """The Python files below directories, each a document; those of the running interpreter's
    standard library if none is given: tens of MB of text that every machine has. `installed`: with
    the packages installed there."""
    outside = {"__pycache__"} | (set() if installed else INSTALLED)
    for index, root in enumerate(roots or [Path(sysconfig.get_paths()["stdlib"])]):
        for path in sorted(root.rglob("*.py"), key=lambda path: path.parts):
            name = path.relative_to(root)
            if outside.isdisjoint(name.parts) and path.is_file() and (content := path.read_bytes()):
                try:
                    content.decode()
                except UnicodeDecodeError:
                    continue  # a few of CPython's tests are in other encodings on purpose
                yield Document(name.as_posix(), index, content)


def builtin_python(tokenizer: str = "bpe:4096", val: float = 0.02) -> Path:
    """The demo's data directory: `python_sources`, prepared once into the user's cache.

    It is found by a hash of contents and settings, and verified in full each time it is used.
    Several processes may call this at once: each prepares a directory of its own, one is kept.
    """
    corpus = list(python_sources())
    key = hashlib.sha256(f"{shards.FORMAT} {tokenizer} {PATTERN} {val}".encode())
    for document in corpus:
        key.update(hashlib.sha256(document.data).digest())
    target = cache_directory() / f"python-{key.hexdigest()[:12]}"

    def usable() -> bool:
        if target.exists():
            try:
                manifest = shards.open_data(target, verify="full").manifest
                if manifest and load(target).hash == manifest["tokenizer"]["hash"]:
                    return True
                log.warning("prepare: rebuilding the demo's data: another tokenizer in %s", target)
            except (DataError, TokenizerError) as error:
                log.warning("prepare: rebuilding the demo's data: %s", error)
        return False

    if usable():
        log.info("prepare: using %s, verified", target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".python-", dir=target.parent) as scratch:
        new, names = Path(scratch, "new"), [f"Python {platform.python_version()} standard library"]
        prepare_documents(lambda: iter(corpus), names, new, tokenizer, val)
        try:
            new.rename(target)
        except OSError:  # it exists: another process was faster, or it is the damaged one
            if not usable():
                target.rename(Path(scratch, "damaged"))
                new.rename(target)
    return target

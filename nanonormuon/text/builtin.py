"""The demo's text: the Python sources that come with an interpreter, prepared once and cached."""

import hashlib
import logging
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from nanonormuon.errors import DataError
from nanonormuon.storage import shards
from nanonormuon.storage.files import cache_directory
from nanonormuon.text.bpe import PATTERN
from nanonormuon.text.prepare import alone, prepare_documents
from nanonormuon.text.sources import Document
from nanonormuon.text.tokenizer import load

log = logging.getLogger(__name__)
INSTALLED = {"site-packages", "dist-packages"}


def python_sources(roots: list[Path] | None = None, installed: bool = False) -> Iterator[Document]:
    """The Python files below directories, each a document; by default those of the running
    interpreter's standard library, tens of MB of text that every machine has. `installed`: include
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
    Several processes may call this at once: one prepares it, the others wait.
    """
    corpus = list(python_sources())
    key = hashlib.sha256(f"{shards.FORMAT} {tokenizer} {PATTERN} {val}".encode())
    for document in corpus:
        key.update(hashlib.sha256(document.data).digest())
    target = cache_directory() / f"python-{key.hexdigest()[:12]}"
    if not _usable(target):
        with alone(target.parent, wait=True):
            if not _usable(target):
                shutil.rmtree(target, ignore_errors=True)
                names = [f"Python {platform.python_version()} standard library"]
                prepare_documents(lambda: iter(corpus), names, target, tokenizer, val)
                return target
    log.info("prepare: using %s, verified", target)
    return target


def _usable(target: Path) -> bool:
    """Whether the directory holds complete and undamaged data."""
    if not (target / shards.MANIFEST).exists():
        return False
    try:
        manifest = shards.open_data(target, verify="full").manifest
        if load(target).hash == manifest["tokenizer"]["hash"]:
            return True
        log.warning("prepare: rebuilding the demo's data: another tokenizer in %s", target)
    except DataError as error:
        log.warning("prepare: rebuilding the demo's data: %s", error)
    return False

"""Proves: each script of data/ makes shards from files at hand, and those with a network part fetch
from a hub (a local server here), go on where a download broke off, and notice damage."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from support import ROOT, write_shard

from nanonormuon.storage import shards


def script(name, *arguments, **env):
    done = subprocess.run(
        [sys.executable, str(ROOT / "data" / f"{name}.py"), *map(str, arguments)],
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", **env},
        capture_output=True,
        text=True,
        timeout=900,
    )
    return done.returncode, done.stdout, done.stderr


class Hub:
    """As much of the hub's protocol as huggingface_hub uses, and a note of what was asked."""

    def __init__(self):
        self.files, self.asked = {}, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_HEAD(self):  # the protocol's own name
                self.do_GET()

            def do_GET(self):
                path = urllib.parse.unquote(self.path.partition("?")[0])
                hub.asked.append((self.command, path, self.headers.get("Range")))
                if match := re.fullmatch("/api/datasets/(.+?)/(tree|revision)/(.+)", path):
                    names = [
                        n.split("/resolve/")[1].removeprefix(f"{match[3]}/") for n in hub.files
                    ]
                    tree = [{"type": "file", "path": n, "oid": "0" * 40, "size": 1} for n in names]
                    siblings = {"id": match[1], "siblings": [{"rfilename": n} for n in names]}
                    body = json.dumps(tree if match[2] == "tree" else siblings).encode()
                    return self.answer(200, body, {"Content-Type": "application/json"})
                if path not in hub.files:
                    return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                content = hub.files[path]
                digest = hashlib.sha256(content).hexdigest()
                known = {"ETag": f'"{digest}"', "X-Repo-Commit": "1" * 40, "Accept-Ranges": "bytes"}
                start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
                if start:
                    size = len(content)
                    known["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
                return self.answer(206 if start else 200, content[start:], known)

            def answer(self, code, body, headers):
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def env(self, tmp_path):
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",  # whatever the environment of the tests says
        }


@pytest.fixture
def hub():
    pytest.importorskip("huggingface_hub")
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def shard(tmp_path, n, largest=50_256):
    tokens = np.random.default_rng(n).integers(0, largest + 1, n)
    tokens[7] = largest
    write_shard(tmp_path / "x.bin", tokens, largest + 1)
    return (tmp_path / "x.bin").read_bytes()


@pytest.mark.slow
def test_fineweb(hub, tmp_path):
    base, out = "/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_", tmp_path / "out"
    hub.files[f"{base}val_000000.bin"] = shard(tmp_path, 5000)
    for i in (1, 2):
        hub.files[f"{base}train_{i:06d}.bin"] = shard(tmp_path, 300_000 + i)
    arguments = ("fineweb", "--out", out, "--shards", 2)
    code, text, err = script(*arguments, **hub.env(tmp_path))
    assert code == 0, err
    assert "605,003 tokens in 3 shards" in text
    data = shards.open_data(out, 50_257)
    assert (data.train.tokens, data.val.tokens) == (600_003, 5000)
    hub.asked.clear()
    damaged = out / "fineweb_train_000001.bin"
    raw = bytearray(damaged.read_bytes())
    raw[4000] ^= 1
    damaged.write_bytes(raw)
    code, text, err = script(*arguments, **hub.env(tmp_path))
    assert code == 0 and text.count("here already, verified") == 2, err
    fetched = [path for method, path, _ in hub.asked if method == "GET"]
    assert fetched == [f"{base}train_000001.bin"]
    raw[4000] ^= 1
    assert damaged.read_bytes() == raw
    code, text, err = script("fineweb", "--out", tmp_path / "b", "--shards", 2, "--from", out)
    assert code == 0 and "605,003 tokens" in text, err
    assert script("fineweb", "--out", out, "--shards", 104)[0] == 2
    hub.files[f"{base}train_000001.bin"] = shard(tmp_path, 5000, 50_300)
    code, text, err = script(*arguments, **hub.env(tmp_path))
    assert code == 3 and "expected an id below 50257" in err and "Traceback" not in err


@pytest.mark.slow
def test_a_download_that_broke_off_goes_on(hub, tmp_path):
    base, out = "/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_", tmp_path / "out"
    for name, size in (("val_000000", 400_000), ("train_000001", 5000)):
        hub.files[f"{base}{name}.bin"] = shard(tmp_path, size)
    arguments = ("fineweb", "--out", out, "--shards", 1)
    out.mkdir()
    content = hub.files[f"{base}val_000000.bin"]
    digest = hashlib.sha256(content).hexdigest()
    for there, code in ((content[:100_000], 0), (content[:9999] + b"?", 3), (content, 0)):
        (out / "fineweb_val_000000.bin").unlink(missing_ok=True)
        (out / f".fineweb_val_000000.bin.{digest[:12]}.part").write_bytes(there)
        hub.asked.clear()
        found, _, err = script(*arguments, **hub.env(tmp_path))
        assert found == code, err
        wanted = [f"bytes={len(there)}-"] if len(there) < len(content) else []
        assert [r for m, p, r in hub.asked if m == "GET" and "val" in p] == wanted
        if code:
            assert f"expected sha256 {digest}" in err
            assert not (out / "fineweb_val_000000.bin").exists()
        else:
            assert (out / "fineweb_val_000000.bin").read_bytes() == content
    assert sorted(p.name for p in out.iterdir()) == [
        "fineweb_train_000001.bin",
        "fineweb_val_000000.bin",
    ]


def test_tinystories(hub, tmp_path):
    stories = "".join(f"Story {i} of a cat.\n<|endoftext|>\n" for i in range(2000)).encode()
    name = "/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-valid.txt"
    hub.files[name] = stories
    (tmp_path / "stories.txt").write_bytes(stories)
    made = []
    for more in (["--small"], ["--from", tmp_path / "stories.txt"]):
        out = tmp_path / more[0]
        code, _, err = script(
            "tinystories", "--out", out, "--tokenizer", "byte", *more, **hub.env(tmp_path)
        )
        assert code == 0, err
        made.append(shards.open_data(out))
        assert sorted(p.suffix for p in out.iterdir()) == [".bin", ".bin", *[".json"] * 3]
    assert made[0].fingerprint == made[1].fingerprint
    assert made[0].manifest["train"]["documents"] + made[0].manifest["val"]["documents"] == 2000


@pytest.mark.slow
def test_any_data_set(hub, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    for i in range(3):
        file = io.BytesIO()
        texts = [f"row {j} of file {i}" for j in range(200)]
        parquet.write_table(pyarrow.table({"body": texts}), file)
        name = f"/datasets/owner/name/resolve/refs/convert/parquet/default/train/000{i}.parquet"
        hub.files[name] = file.getvalue()
    env = hub.env(tmp_path)
    code, text, err = script("hf_dataset", "owner/name", "--list", **env)
    assert code == 0 and text == "--config default --split train: 3 files\n", err
    arguments = ("hf_dataset", "owner/name", "--tokenizer", "byte", "--text-field", "body")
    code, text, err = script(*arguments, "--files", 2, "--out", tmp_path / "out", **env)
    assert code == 0 and "2 files of 3" in text, err
    manifest = shards.open_data(tmp_path / "out").manifest
    assert manifest["train"]["documents"] + manifest["val"]["documents"] == 400
    code, text, err = script(*arguments, "--split", "test", "--out", tmp_path / "b", **env)
    assert code == 3 and "no default/test, found default/train" in err
    offline = {"HF_HUB_OFFLINE": "1"}  # without it the library tries again for 23 s
    code, _, err = script(*arguments, "--out", tmp_path / "b", **(env | offline))
    assert code == 3 and "\nerror: owner/name: " in f"\n{err}" and "Traceback" not in err


def test_python_sources(tmp_path):
    (tmp_path / "src").mkdir()
    for i in range(30):
        (tmp_path / "src" / f"{i}.py").write_text(f"x = {i}\n" * 50)
    code, text, err = script(
        "pysource", "--out", tmp_path / "out", "--dir", tmp_path / "src", "--tokenizer", "byte"
    )
    assert code == 0 and "tokens; next: normuon-train run" in text, err
    assert shards.open_data(tmp_path / "out").manifest["sources"][0]["documents"] == 30

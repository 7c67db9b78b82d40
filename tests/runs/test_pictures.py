"""What is shown is what was logged: tables, curves, the page of a run, and what NorMuon makes of an
update."""

import html.parser
import json
import os
import re
import shutil
import subprocess
from itertools import pairwise

import pytest
import torch
from support import serialise

from nanonormuon.cli import app as cli
from nanonormuon.config import load
from nanonormuon.errors import CheckpointError, RunError
from nanonormuon.lab import results
from nanonormuon.runs import compare, report, spectra
from nanonormuon.runtime import health
from nanonormuon.storage.checkpoints import all_steps, read_json, write
from nanonormuon.storage.run import read_rows
from nanonormuon.storage.tensors import read_tensors
from nanonormuon.train import train


def called(arguments, capsys):
    code = cli.main([str(a) for a in arguments])
    found = capsys.readouterr()
    return code, found.out, found.err


# ----------------------------------------------------------------------------------------- compare


def test_the_table_and_the_target(trained, tmp_path, capsys):
    rows = read_rows(trained / "metrics.jsonl")
    losses = {r["step"]: r["val_loss"] for r in rows if "val_loss" in r}
    target = (losses[20] + losses[40]) / 2
    other = tmp_path / "other"
    shutil.copytree(trained, other, ignore=shutil.ignore_patterns("checkpoints"))
    code, out, _ = called(["compare", trained, other, "--target", target], capsys)
    head, first, second = out.splitlines()
    assert code == 0 and head.split()[:2] == ["run", "optimizer"] and "target_step" in head
    assert first.split()[0] == "run" and second.split()[0] == "other"
    assert f"{losses[60]:.4f}" in first and first.rstrip()[-3:] == compare.sparkline(
        list(losses.values())
    )
    shutil.copytree(other, tmp_path / "again" / "other")
    code, out, _ = called(["compare", trained, other, tmp_path / "again" / "other"], capsys)
    names = [line.split()[0] for line in out.splitlines()[1:]]
    assert names == ["run", str(other), str(tmp_path / "again" / "other")]
    code, out, _ = called(["compare", trained, "--target", target, "--json"], capsys)
    (row,) = json.loads(out)
    assert (row["target_step"], row["target_tokens"], row["steps"]) == (40, 40 * 512, 60)
    assert row["val_loss"] == row["best_val_loss"] == losses[60]
    code, out, _ = called(["compare", trained, "--target", 0, "--json"], capsys)
    assert json.loads(out)[0]["target_step"] is None


@pytest.mark.parametrize(
    ("setting", "checkpoints", "words"),
    [
        ("", True, ""),  # equal fingerprints under two paths are one set
        ("", False, "other: /elsewhere"),
        ("val_tokens = 9", True, ", 9 tokens, windows"),
        ("tuning = 0.5", True, "the last 0.5 of the training tokens"),
        ("seq_len = 16", True, "windows of 32; other"),
        ('mix = "a=0.1"', False, "/elsewhere"),
    ],
)
def test_losses_on_different_tokens_are_called_so(
    setting, checkpoints, words, trained, tmp_path, capsys
):
    other = tmp_path / "other"
    out = None if checkpoints else shutil.ignore_patterns("checkpoints")
    shutil.copytree(trained, other, ignore=out)
    config = re.sub(r'(?m)^path = ".*"', 'path = "/elsewhere"', (other / "config.toml").read_text())
    if setting:
        config = re.sub(rf"(?m)^{setting.split()[0]} = .*", setting, config)
    (other / "config.toml").write_text(config)
    code, out, err = called(["compare", trained, other], capsys)
    assert code == 0 and len(out.splitlines()) == 3 and (words in err if words else not err)


def test_sparklines():
    assert compare.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert compare.sparkline([5.0, 5.0]) == "▁▁" and compare.sparkline([]) == ""
    assert compare.sparkline([9] * 50 + [1] * 50, 10) == "█████▁▁▁▁▁"
    assert compare.sparkline([0, 8, 15], height=2).split("\n") == [" ▁█", "▁██"]


def test_plots(trained, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    drawn = {}
    close = pyplot.close

    def look(figure):
        for axis in figure.axes:
            if axis.get_visible():
                key = axis.get_ylabel(), axis.get_xlabel()
                drawn[key] = [line.get_xydata().tolist() for line in axis.lines]
        close(figure)

    monkeypatch.setattr(pyplot, "close", look)
    code, out, err = called(["compare", trained, "--plot", tmp_path / "p" / "a.png"], capsys)
    assert code == 0 and "a.png" in out, err
    assert (tmp_path / "p" / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows = read_rows(trained / "metrics.jsonl")
    evaluated = [r for r in rows if "val_loss" in r]
    for over in ("step", "tokens", "seconds"):
        assert drawn["val_loss", over] == [[[r[over], r["val_loss"]] for r in evaluated]]
    for key in ("loss", "lr", "grad_norm", "neuron_rms_mean", "update_ratio"):
        assert drawn[key, "step"] == [[[r["step"], r[key]] for r in rows]]
    strange = tmp_path / os.fsdecode(b"a$\\frac$\xff")  # as formula and as UTF-8
    shutil.copytree(trained, strange, ignore=shutil.ignore_patterns("checkpoints"))
    with open(strange / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "$\\\\frac$": 1.0, "\\ud800": 2}\n')
    assert called(["compare", strange, "--plot", tmp_path / "a.svg"], capsys)[0] == 0
    assert "<svg" in (tmp_path / "a.svg").read_text()[:2000]


@pytest.mark.slow
@pytest.mark.parametrize(("span", "ratio"), [(1, 4), (700, 90), (1 << 28, 1e4)])
def test_labels_do_not_overlap_and_every_line_has_a_name(span, ratio, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    seen = []
    close = pyplot.close

    def look(figure):
        for axis in filter(lambda axis: axis.get_visible(), figure.axes):
            labels = [text for text in axis.get_xticklabels() if text.get_text()]
            boxes = sorted((text.get_window_extent() for text in labels), key=lambda b: b.x0)
            shown = [b for b in boxes if axis.bbox.x0 - 5 <= (b.x0 + b.x1) / 2 <= axis.bbox.x1 + 5]
            assert len(shown) > 1 and all(a.x1 < b.x0 for a, b in pairwise(shown))
            assert len({line.get_linestyle() for line in axis.lines}) >= 2
        seen.extend(text.get_text() for text in figure.axes[0].get_legend().get_texts())
        close(figure)

    monkeypatch.setattr(pyplot, "close", look)
    rows = [{"step": i * span, "val_loss": 1 / i, "tokens": i * 3 * span, "seconds": i / span}
            for i in range(1, 9)]  # fmt: skip
    equal = [compare.RunRecord(tmp_path, name, {}, rows) for name in "ab"]
    compare.plot(equal, tmp_path / "a.png", 0.5)
    assert seen == ["a", "b", "target 0.5"]
    rates = [1e-5 * ratio ** (i / 4) for i in range(5)]
    tuning = [{"lr": rate, "val_loss": [1.0]} for rate in rates]
    optimizers = [{"optimizer": name, "tuning": tuning, "curves": [[[span, 1.0]]]} for name in "ab"]
    results.draw({"steps": span, "optimizers": optimizers}, tmp_path / "b.png")


def test_what_cannot_be_compared(trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "young").mkdir()
    shutil.copy(trained / "config.toml", tmp_path / "young")
    for name in ("summary.json", "evaluations.json", "environment.json"):
        damaged = tmp_path / f"damaged-{name}"
        shutil.copytree(trained, damaged, ignore=shutil.ignore_patterns("checkpoints"))
        (damaged / name).write_text('{"results": [7')
        found, _, err = called(["report", damaged, "-o", tmp_path / "r.html"], capsys)
        assert found == 4 and err.startswith(f"error: {damaged / name}: "), err
        assert called(["compare", damaged], capsys)[0] == 0  # it reads none of them
    for arguments, code, words in (
        (["compare", tmp_path / "empty"], 2, "not a run directory"),
        (["compare", tmp_path / "young"], 2, "no step is logged"),
        (["compare", trained, "--plot", "a.gif"], 2, "expected a name that ends in .png"),
        (["compare"], 2, "RUN"),
        (["report", tmp_path / "empty"], 2, "not a run directory"),
        (["report", trained, "--out", trained / "config.toml" / "x.html"], 8, "config.toml"),
        (["diagnose", tmp_path / "empty"], 4, "expected a run directory"),
        (["diagnose", trained, "--layers", "one"], 2, "0,5,11"),
        (["diagnose", trained, "--plot", tmp_path / "a.png", "--layers", "0,7"], 2, "0 to 1"),
        (["diagnose", trained, "--plot", tmp_path / "a.gif"], 2, "ends in .png"),
    ):
        found, _, err = called(arguments, capsys)
        assert found == code and words in err and "Traceback" not in err, err
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    found, _, err = called(["compare", trained, "--plot", tmp_path / "a.png"], capsys)
    assert found == 2 and "pip install matplotlib" in err


DAMAGED = [b'{"step": 5, "loss": "low", "lr": 0.1}', b'{"step": 10, "seconds": null, "loss": 3}',
           b'{"step": 15, "val_loss": 1' + b"0" * 400 + b"}", b"[20]", b'{"step": "25"}',
           b'{"step": 30, "loss": {}, "val_bpb": null}', b'{"step": 35, "loss": 2.5, "lr": \xff',
           b'{"loss": 2}', b'{"step": true}', b"[" * 2000]  # fmt: skip
KEPT = b"""{"step": 40, "loss": 1.5, "lr": 0.1, "grad_norm": Infinity, "seconds": NaN}
{"step": 40, "val_loss": 1.25, "tokens": 1e999}
{"step": 50, "loss": NaN, "val_loss": NaN, "val_bpb": NaN}
"""


def test_damaged_rows_are_left_out_and_named_once(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    file = run / "metrics.jsonl"
    file.write_bytes(b"\n".join([*DAMAGED, KEPT]))
    (run / "samples.jsonl").write_bytes(b'{"step": 7, "text": 8}\n{"step": 9, "text": "all of it"}')
    where = "line 1: 'loss', line 2: 'seconds', line 3: 'val_loss' and 7 more"
    metrics = f"{file}: left out, because damaged: {where}"
    samples = f"{run / 'samples.jsonl'}: left out, because damaged: line 1: 'text'"
    code, out, err = called(["compare", run, "--target", 2, "--json"], capsys)
    assert code == 0 and err.splitlines() == [metrics]
    (row,) = json.loads(out)
    assert (row["steps"], row["target_step"], row["val_loss"]) == (50, 40, 1.25)
    assert called(["compare", run], capsys)[0] == 0
    code, _, err = called(["report", run, "-o", tmp_path / "r.html"], capsys)
    assert code == 0 and err.splitlines() == [metrics, samples]
    page = (tmp_path / "r.html").read_text()
    assert "NaN" not in page and "Infinity" not in page and "all of it" in page
    code, _, err = called(["run", "--resume", "--out", run], capsys)
    assert code == 0 and err.count("left out, because damaged") == 2
    assert metrics in (run / "train.log").read_text()
    rows = {row["step"]: row for row in read_rows(file)}
    assert [*rows] == [5, 10, 15, 30, 40, 50, 60] and rows[5] == {"step": 5, "lr": 0.1}
    assert {"val_loss", "val_bpb"} < rows[60].keys()  # the last checkpoint's, evaluated again
    assert rows[40]["loss"] == 1.5 and rows[40]["val_loss"] == 1.25
    assert json.loads((run / "summary.json").read_text())["best_val_loss"] == rows[60]["val_loss"]


@pytest.mark.parametrize("name", ["normuon", "adamw"])
def test_what_a_row_says_of_the_weights(name, tiny, tmp_path):
    """Beside the weights themselves, before and after each step, logged for whatever reason."""
    more = [f"optim.name={name}", "optim.weight_decay=0.5", "train.log_every=3"]
    more += ["train.save_every=1", "train.keep_last=0", "train.sample_tokens=0"]
    train(load([*tiny, *more])[0], tmp_path / "run")
    rows = {r["step"]: r for r in read_rows(tmp_path / "run" / "metrics.jsonl")}
    before = None
    for path in all_steps(tmp_path / "run" / "checkpoints"):
        weights = read_tensors(path / "model.safetensors")
        after = [t for key, t in weights.items() if "_proj" in key]
        neurons = torch.cat([t.square().mean(1).sqrt() for t in after])
        row = rows[read_json(path / "state.json")["step"]]
        found = [row[f"neuron_rms_{which}"] for which in ("min", "mean", "max")]
        assert found == pytest.approx([float(f(neurons)) for f in (min, torch.mean, max)])
        if before is not None:
            a, b = (torch.cat([t.flatten() for t in side]) for side in (before, after))
            assert row["update_ratio"] == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-4)
        before = after
    assert len(rows) == 8


def test_only_logged_steps_are_measured(tiny, tmp_path, monkeypatch):
    measured, squares = [], health.squares
    monkeypatch.setattr(health, "squares", lambda t: measured.append(1) or squares(t))
    more = ["train.log_every=3", "train.eval_every=4", "train.save_every=5", "train.sample_every=7"]
    train(load([*tiny, *more, "train.steps=11"])[0], tmp_path / "run")
    steps = [r["step"] for r in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [3, 4, 5, 6, 7, 8, 9, 10, 11] and len(measured) == 2 * len(steps)


# ------------------------------------------------------------------------------------------ report


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory):
    """The page of a run whose last row and sample would break a careless one."""
    run = tmp_path_factory.mktemp("page") / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("checkpoints"))
    rows = read_rows(run / "metrics.jsonl")
    rows[-1]["</script><i>"] = 1
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with open(run / "samples.jsonl", "a") as file:
        file.write(json.dumps({"step": 60, "prompt": "</script><b>", "text": "&amp;\u2028"}) + "\n")
        file.write(json.dumps({"step": 61, "prompt": "", "text": "a\u2028b\u0085c"},
                              ensure_ascii=False) + "\n")  # fmt: skip
    with open(run / "samples.jsonl", "ab") as file:
        file.write('{"step": 62, "prompt": "é'.encode()[:-1])  # cut short inside a character
    out = run.parent / "report.html"
    assert cli.main(["report", str(run), "-o", str(out)]) == 0
    return run, out


class Elements(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.text, self.open = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


def test_the_page_holds_everything_and_refers_to_nothing(page):
    run, out = page
    text = out.read_text(encoding="utf-8")
    elements = Elements(text)
    assert not re.search(r"https?://|@import|url\(", text)
    assert not any({"src", "href"} & attributes.keys() for _, attributes in elements.found)
    rows = read_rows(run / "metrics.jsonl")
    data = next(t for t in elements.text["script"] if t.lstrip().startswith("["))
    assert json.loads(data) == [{"name": "run", "rows": rows}]
    assert "</script><b>" in elements.text["b"] and "&amp;\u2028" in elements.text["pre"]
    assert {"step 0", "step 60", "step 61"} <= {*elements.text["p"]}
    assert "a\u2028b\u0085c" in "".join(elements.text["pre"])
    assert any("steps = 60" in t for t in elements.text["pre"])
    assert any("torch" in t for t in elements.text["th"])  # environment.json


def test_a_page_replaces_its_own_run_s_page_only(page, trained, tmp_path, capsys):
    run, _ = page
    out = tmp_path / "report.html"
    for source, code in ((run, 0), (run, 0), (trained, 2)):
        assert cli.main(["report", str(source), "--out", str(out)]) == code
    assert f"{out}: exists and is not a page of {trained}" in capsys.readouterr().err
    assert "<h1>run: nanonormuon</h1>" in out.read_text()
    out.write_text("my own")
    assert cli.main(["report", str(run), "-o", str(out)]) == 2 and out.read_text() == "my own"


def test_a_page_of_several_runs_names_what_differs(page, tmp_path, capsys):
    run, _ = page
    other, out = tmp_path / "other", tmp_path / "two.html"
    shutil.copytree(run, other)
    config = (other / "config.toml").read_text()
    (other / "config.toml").write_text(config.replace("steps = 60", "steps = 61"))
    assert cli.main(["report", str(run), str(other), "--out", str(out)]) == 0
    elements = Elements(out.read_text())
    assert elements.text["summary"] == ["run", "other"] and "train.steps" in elements.text["th"]
    data = next(t for t in elements.text["script"] if t.lstrip().startswith("["))
    assert [found["name"] for found in json.loads(data)] == ["run", "other"]
    assert cli.main(["report", str(run), "--out", str(out)]) == 2  # the page is not that run's
    with pytest.raises(RunError):
        report.write([report.Path("/nonexistent")], report.Path("x.html"))


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


def browse(folder, address, wish):
    """What a browser prints of a page, for one wish more than a window of 800 x 2000."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
             "--no-first-run", f"--user-data-dir={folder / 'profile'}",
             "--window-size=800,2000"]  # fmt: skip
    done = subprocess.run(
        [BROWSER, *flags, wish, address], capture_output=True, timeout=900, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium to open the page")
@pytest.mark.parametrize("count", [1, 2])
def test_a_browser_draws_what_was_logged(count, page, tmp_path):
    run, out = page
    rows = read_rows(run / "metrics.jsonl")
    if count == 2:
        shutil.copytree(run, tmp_path / "b<i>")
        out = tmp_path / "two.html"
        report.write([run, tmp_path / "b<i>"], out)
    dom = browse(tmp_path, f"file://{out}", "--dump-dom")
    elements = Elements(dom)
    charts = [a["data-keys"] for tag, a in elements.found if tag == "svg"]
    assert charts == [
        "loss val_loss", "val_bpb", "lr", "grad_norm",
        "neuron_rms_min neuron_rms_mean neuron_rms_max", "update_ratio", "tokens_per_second",
    ]  # fmt: skip
    curves = [a["points"].split() for tag, a in elements.found if tag == "polyline"]
    assert sorted(map(len, curves)) == [3] * 2 * count + [12] * 8 * count
    heights = [float(p.split(",")[1]) for p in curves[0]]  # y grows downwards: a falling loss
    order = sorted(range(12), key=lambda i: rows[i]["loss"])
    assert sorted(range(12), key=lambda i: -heights[i]) == order
    names = elements.text["span"]
    assert ("b<i> val_loss (dashed)" if count == 2 else "val_loss") in names


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium to open the page")
@pytest.mark.parametrize("scale", [1, 20_000])
def test_no_label_of_a_chart_lies_on_another_or_outside(scale, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("checkpoints"))
    rows = [{"step": i * scale, "loss": i / scale, "lr": 0.5} for i in range(1, 61)]
    rows[-1]["val_loss"] = 1.0  # a single value makes no curve
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report.write([run], tmp_path / "r.html")
    dom = browse(tmp_path, f"file://{tmp_path / 'r.html'}", "--dump-dom")
    loss, lr = re.findall(
        r'<svg viewBox="0 0 760 274"\s+data-keys="(?:loss|lr)">(.*?)</svg>', dom, re.S
    )
    for chart in (loss, lr):
        boxes = []
        for x, y, anchor, label in re.findall(
            r'<text x="(.*?)" y="(.*?)" text-anchor="(.*?)">(.*?)<', chart
        ):
            width = 6.5 * len(label)  # 11 pixels high
            left = float(x) - width / (2 if anchor == "middle" else 1)
            boxes.append((left, float(y) - 9, left + width, float(y) + 2))
            assert left >= 0 and left + width <= 760 and float(y) + 2 <= 274
        for i, a in enumerate(boxes):
            assert not [
                b for b in boxes[:i] if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
            ]
        assert len(boxes) > 5


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium to open the page")
def test_a_browser_shows_the_curve_and_what_the_pointer_is_at(page, tmp_path):
    run, out = page
    hover = """<script>
    const svg = document.querySelector("svg"), box = svg.getBoundingClientRect();
    svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width * 0.98}));
    </script></body>"""
    (tmp_path / "hover.html").write_text(out.read_text().replace("</body>", hover))
    shot = tmp_path / "page.png"
    address = f"file://{tmp_path / 'hover.html'}"
    browse(tmp_path, address, f"--screenshot={shot}")
    dom = browse(tmp_path, address, "--dump-dom")
    last = read_rows(run / "metrics.jsonl")[-1]
    readout = re.search(r'<div class="readout">(step.*?)</div>', dom)[1]
    assert readout.startswith("step 60 ") and f"loss {last['loss']:.5g}"[:9] in readout
    image = pytest.importorskip("PIL.Image").open(shot).convert("RGB")
    near = [
        (x, y) for x in range(image.width) for y in range(image.height)
        if all(abs(a - b) < 40 for a, b in zip(image.getpixel((x, y)), (0x1F, 0x6F, 0xEB)))
    ]  # fmt: skip
    assert len(near) > 500  # the curves' blue ...
    assert max(x for x, _ in near) - min(x for x, _ in near) > image.width * 0.7  # ... across


# ---------------------------------------------------------------------------------------- diagnose


def test_profiles_are_those_of_the_updates(trained, capsys):
    profiles = spectra.diagnose(trained)
    assert len(profiles) == 2 * 7
    found = all_steps(trained / "checkpoints")[-1]
    buffers = read_tensors(found / "optimizer.safetensors")
    for name, kinds in profiles.items():
        M = buffers[f"{name}.momentum"].double()
        U, S, V = torch.linalg.svd(M, full_matrices=False)
        rms = S.square().mean().sqrt()
        assert torch.allclose(kinds["momentum"].singular_values.double(), S / rms, atol=1e-4)
        # Muon: singular values between 0.7 and 1.2 where they are not tiny, in the same basis
        X, (a, b, c) = M / M.norm(), (3.4445, -4.7750, 2.0315)
        s = S / M.norm()
        for _ in range(5):
            s = a * s + b * s**3 + c * s**5
        O = U @ torch.diag(s) @ V
        expected = {"muon": O}
        expected["normuon"] = O / (buffers[f"{name}.second_moment"].double().sqrt() + 1e-10)
        for kind, X in expected.items():
            rows = X.norm(dim=1)
            rows = rows / rows.square().mean().sqrt()
            assert torch.allclose(kinds[kind].row_norms.double(), rows, atol=2e-3), (name, kind)
    numbers = spectra.as_numbers(profiles)
    wide = [row for row in numbers if "gate" in row["matrix"] or "up" in row["matrix"]]
    for row in wide:  # where Muon leaves neurons apart, NorMuon does not
        spread = [row[kind]["row_spread"] for kind in ("momentum", "muon", "normuon")]
        assert spread == sorted(spread, reverse=True) and spread[2] < 0.7 * spread[1]
    code, out, _ = called(["diagnose", trained, "--json"], capsys)
    assert code == 0 and json.loads(out) == numbers


def test_the_picture_and_a_run_without_second_moments(trained, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    found = all_steps(trained / "checkpoints")[-1]
    files = {p.name: p.read_bytes() for p in found.iterdir() if p.name != "manifest.json"}
    buffers = read_tensors(found / "optimizer.safetensors")
    buffers = {n: t for n, t in buffers.items() if not n.endswith("second_moment")}
    files["optimizer.safetensors"] = serialise(buffers)
    muon = write(tmp_path / "muon", read_json(found / "state.json")["step"], files)
    arguments = ["diagnose", muon, "--plot", tmp_path / "d.png", "--layers", "1"]
    code, out, err = called(arguments, capsys)
    assert code == 0, err
    assert "row spread muon" in out and "normuon" not in out
    assert (tmp_path / "d.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "plain").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(found / name, tmp_path / "plain")
    code, out, err = called(["diagnose", tmp_path / "plain"], capsys)  # no momentum, but weights
    assert code == 0 and "row spread weights" in out and "momentum" not in out, err
    profile = spectra.diagnose(tmp_path / "plain")["layers.0.mlp.up_proj.weight"]["weights"]
    W = read_tensors(found / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    norms = W.norm(dim=1)
    assert torch.allclose(profile.row_norms, norms / norms.square().mean().sqrt())
    shutil.copy(found / "state.json", tmp_path / "plain")
    code, _, err = called(["diagnose", tmp_path / "plain"], capsys)
    assert code == 4 and "expected a run's checkpoint" in err


def test_buffers_that_no_run_saves_and_a_matrix_without_a_second_moment(trained, monkeypatch):
    name, read = "layers.0.mlp.up_proj.weight", spectra.read_tensors

    def diagnose(key, change):
        def changed(path):
            buffers = read(path)
            buffers[f"{name}.{key}"] = change(buffers[f"{name}.{key}"])
            return {key: value for key, value in buffers.items() if value is not None}

        monkeypatch.setattr(spectra, "read_tensors", changed)
        return spectra.diagnose(trained)

    for key in ("momentum", "second_moment"):
        for change in (lambda t: t * float("nan"), lambda t: t.view(-1), lambda t: t[None]):
            words = f"{key.replace('_', ' ')} of {name} has shape"
            with pytest.raises(CheckpointError, match=words):
                diagnose(key, change)
    with pytest.raises(CheckpointError, match="an update is not finite"):
        diagnose("second_moment", lambda t: t - 1)
    rows = spectra.table(diagnose("second_moment", lambda t: None)).splitlines()
    (row,) = (row.split() for row in rows if row.startswith(name))
    assert row[3] == row[6] == "-" and "-" not in rows[1].split()


@pytest.mark.parametrize(
    ("line", "code"),
    [('val_tokens = "x"', 0), ('tuning = "x"', 0), ("tuning = [1]", 2), ("seq_len = {a = 1}", 2),
     ("[[optim]]\nlr = 1", 2), ("[optim]\nname = 1979-05-27", 2)],
)  # fmt: skip
def test_a_configuration_that_no_run_wrote_is_compared_or_refused(line, code, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "val_loss": 2.0}\n')
        (tmp_path / name / "config.toml").write_text("[data]\n" + (line if name == "b" else ""))
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == code
    found = capsys.readouterr()
    assert ("config.toml" in found.err) == bool(code) and ("best_val_loss" in found.out) != bool(
        code
    )

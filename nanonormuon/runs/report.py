"""Runs as one self-contained HTML page: curves to hover over, samples, configuration. The page
draws the curves itself, from the rows of metrics.jsonl that it holds (report.html)."""

import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from nanonormuon.errors import UsageError
from nanonormuon.pretrained.judge import RESULTS, kept
from nanonormuon.runs.compare import RunRecord, read_all, row_of, spell
from nanonormuon.storage.checkpoints import read_json
from nanonormuon.storage.files import read_file, replace_file
from nanonormuon.storage.run import read_rows


class Page(Template):
    """A page whose placeholders are @@NAME, since scripts use $."""

    delimiter = "@@"


def write(paths: Sequence[Path], out: Path) -> None:
    """Write the page of one run directory or several, or replace the page of the same ones. Raises
    RunError, CheckpointError, UsageError, OSError."""
    runs = read_all(paths)
    if out.is_dir():
        raise UsageError(f"--out {out}: a directory, expected a page's name, as {out}/run.html")
    origin = hashlib.sha256("\n".join(str(p.resolve()) for p in paths).encode()).hexdigest()
    mark = f'content="{origin}"'.encode()
    names = ", ".join(map(str, paths))
    if out.exists() and not (out.is_file() and mark in out.read_bytes()[:1000]):
        raise UsageError(f"--out {out}: exists and is not a page of {names}: choose another name")
    body = [overview(runs), '<div id="charts"></div>']
    for run in runs:
        name = html.escape(run.name)
        body += [f"<details open><summary>{name}</summary>"] if len(runs) > 1 else []
        body += [*details(run.path), *(["</details>"] if len(runs) > 1 else [])]
    curves = [{"name": run.name, "rows": run.rows} for run in runs]
    rows = json.dumps(curves).replace("<", "\\u003c")
    title = html.escape(f"{', '.join(run.name for run in runs)}: nanonormuon")
    out.parent.mkdir(parents=True, exist_ok=True)
    page = Page(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    page = page.substitute(origin=origin, title=title, body="\n".join(body), rows=rows)
    replace_file(out, page.encode(errors="xmlcharrefreplace"))


def overview(runs: Sequence[RunRecord]) -> str:
    """The runs' results, a column each, and the settings in which they differ."""
    columns = [{k: spell(k, v) for k, v in row_of(run, None).items()} for run in runs]
    settings = [{f"{s}.{k}": v for s, t in r.config.items() for k, v in t.items()} for r in runs]
    for key in dict.fromkeys(key for table in settings for key in table):
        if len({str(table.get(key, "-")) for table in settings}) > 1:
            for column, table in zip(columns, settings):
                column.setdefault(key.removeprefix("optim."), table.get(key, "-"))
    return key_values(*columns)


def details(run: Path) -> list[str]:
    """Samples, results, environment and configuration of a run."""
    parts = samples(run / "samples.jsonl")
    for name in (RESULTS, "summary.json", "environment.json"):
        if (run / name).exists():
            tables = kept(run / name) if name == RESULTS else [read_json(run / name)]
            parts += [f"<h2>{name.split('.')[0].capitalize()}</h2>", *map(key_values, tables)]
    config = read_file(run / "config.toml").decode()
    return [*parts, "<h2>Configuration</h2>", f"<pre>{html.escape(config)}</pre>"]


def key_values(*columns: dict[str, Any]) -> str:
    """A table of equal keys, without those that have no value in the first column."""
    rows = []
    for key in (key for key, value in columns[0].items() if value is not None):
        values = (spell(key, v) if isinstance(v := c.get(key), float) else v for c in columns)
        cells = "".join(f"<td>{html.escape(str(value))}</td>" for value in values)
        rows.append(f"<tr><th>{html.escape(str(key))}</th>{cells}</tr>")
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def samples(file: Path) -> list[str]:
    """The samples of each prompt side by side, in the order of their steps; of a step that was
    repeated after an interruption, the later one."""
    rows = read_rows(file)
    parts = ["<h2>Samples</h2>"] if rows else []
    for prompt in dict.fromkeys(row.get("prompt", "") for row in rows):
        parts.append('<div class="samples">')
        for row in (row for row in rows if row.get("prompt", "") == prompt):
            text = f"<b>{html.escape(prompt)}</b>{html.escape(row.get('text', ''))}"
            parts.append(f"<div><p>step {row['step']:,}</p><pre>{text}</pre></div>")
        parts.append("</div>")
    return parts

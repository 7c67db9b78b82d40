"""The package's own order: imports point one way, nothing is left out of an installation or of the
hash of the source, and it stays small enough to be read."""

import ast
import functools
import graphlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from support import ROOT

from nanonormuon.config import load
from nanonormuon.runtime import distributed
from nanonormuon.runtime.faults import Stopping, Watch
from nanonormuon.storage.run import RunDirectory
from nanonormuon.train import Trainer

PACKAGE = ROOT / "nanonormuon"
# A file or room may import what stands before it, and within a room anything without a circle.
ORDER = """errors storage.files storage.values parts.config | model | parts | normuon | config
    | optim | storage | runtime | text | data | evaluate sample engine checkpoint | runtime.bitwise
    | build | train
    | pretrained | runs | lab | cli"""
LEVEL = {name: i for i, group in enumerate(ORDER.split("|")) for name in group.split()}
UPWARD = {  # imported in a function
    ("build", "pretrained.models"),  # only for --init-from
    ("model", "parts.bigram"),  # only with model.bigram_embed
    ("model", "parts.experts"),  # only with model.mlp = experts
    ("model", "parts.latent"),  # only with model.attention = latent
    ("model", "parts.shift"),  # only with model.key_shift
    ("optim", "lab.external"),  # only with optim.name = zoo:NAME, FILE.py:Class or module:Class
}


@functools.cache
def modules():
    """Syntax trees by name without the package's own: "train", "storage.files"."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def imported(tree):
    """Dotted names that a tree imports at any depth; of "from a import b" both a and a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def level(name):
    """Where a module stands: by its own name, or by its room's."""
    return LEVEL[name] if name in LEVEL else LEVEL[name.partition(".")[0]]


@pytest.fixture(scope="module")
def graph():
    """Which module imports which of the package's own, functions' late imports among them."""
    trees = {name: tree for name, tree in modules().items() if not name.startswith("__")}
    found = {name: imported(tree) for name, tree in trees.items()}
    return {a: {b for b in trees if f"nanonormuon.{b}" in found[a]} for a in trees}


def test_imports_point_one_way(graph):
    wrong = []
    for name, others in graph.items():
        for other in others:
            if level(other) > level(name) and (name, other) not in UPWARD:
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_no_circle(graph):
    downward = {a: {b for b in others if (a, b) not in UPWARD} for a, others in graph.items()}
    graphlib.TopologicalSorter(downward).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("name", ["model", "normuon"])
def test_model_and_optimizer_import_torch_alone(name):
    """Each can be copied into another project: normuon.py as it is, model.py with its parts."""
    found = {other for other in imported(modules()[name]) if ".parts" not in other}
    assert {other.partition(".")[0] for other in found} - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("name", [n for n in modules() if n.startswith("parts.")])
def test_parts_of_the_model_import_torch_and_the_model_alone(name):
    found = {other for other in imported(modules()[name]) if ".parts" not in other}
    assert not [n for n in found if "nanonormuon" in n and "nanonormuon.model" not in n]
    assert {n.partition(".")[0] for n in found} - sys.stdlib_module_names <= {
        "torch",
        "nanonormuon",
    }


def test_the_training_loop_loads_few_modules(forks):
    assert "nanonormuon.train" in forks.loaded and len(forks.loaded) <= 26, forks.loaded


# ------------------------------------------------------------------------------------------------
# Nothing is left out


def everything():
    """Python files, recipes and templates, by their path in the package."""
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return sorted(path.relative_to(PACKAGE).as_posix() for path in files)


HASHES = """
import sys
from nanonormuon.storage import run
from pathlib import Path
package, before = Path(sys.argv[1]) / "nanonormuon", run.source_hash()
print(*run.source_files())
for path in run.source_files().values():
    assert path.is_relative_to(package), path
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"#")
    assert run.source_hash() != before, path
    path.write_bytes(content)
assert run.source_hash() == before
"""


def test_the_hash_of_the_source_covers_every_file(tmp_path):
    """A copy of the package, in which each file in turn has one byte changed."""
    shutil.copytree(PACKAGE, tmp_path / "nanonormuon", ignore=shutil.ignore_patterns("*.pyc"))
    done = subprocess.run(
        [sys.executable, "-c", HASHES, str(tmp_path)], cwd=tmp_path, env={"PYTHONPATH": tmp_path},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == everything() and len(everything()) > 40


def test_an_installation_contains_every_file(tmp_path):
    """What setuptools would put into a wheel."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source / "nanonormuon", ignore=shutil.ignore_patterns("*.pyc"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = subprocess.run(
        [sys.executable, "-c", "import setuptools; setuptools.setup()", "build_py",
         "--build-lib", tmp_path / "built"],
        cwd=source, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    built = {p.relative_to(tmp_path / "built" / "nanonormuon").as_posix() for p in
             (tmp_path / "built").rglob("*.*")}  # fmt: skip
    assert set(everything()) <= built


@pytest.mark.slow
def test_a_wheel_works_without_the_repository(tmp_path):
    """Commands, recipes, license and entry point, from the unpacked wheel alone."""
    pytest.importorskip("setuptools", "77")
    source, installed = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(PACKAGE, source / "nanonormuon", ignore=shutil.ignore_patterns("*.pyc"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "dist").iterdir()
    shutil.unpack_archive(wheel, installed, "zip")
    about = next(installed.glob("*.dist-info"))
    assert "normuon-train = nanonormuon.cli.app:entry" in (about / "entry_points.txt").read_text()
    assert "License-Expression: MIT" in (about / "METADATA").read_text()
    assert (about / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    for arguments in (["recipes"], ["show", "demo"], ["--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "nanonormuon", *arguments], cwd=tmp_path, text=True,
            env={"PYTHONPATH": str(installed)}, capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0 and "demo" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_source_distribution_is_a_checkout(tmp_path):
    """Tests, their golden numbers and all that they run are in it."""
    pytest.importorskip("setuptools")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a checkout")
    files = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as content:
        found = {name.partition("/")[2] for name in content.getnames()}
    assert set(files) <= found
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (source,) = (tmp_path / "unpacked").iterdir()
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"  # as pip does
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "dist").iterdir()
    with zipfile.ZipFile(wheel) as content:
        assert {f"nanonormuon/{name}" for name in everything()} <= set(content.namelist())


# ------------------------------------------------------------------------------------------------
# Small enough to be read

# the lab's optimizers and tracks and the parts of other architectures come on top
BESIDE = {"experts.py", "latent.py", "bigram.py", "shift.py", "speedrun.py"}


def test_the_package_stays_small():
    top = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert len(top) <= 12, sorted(top)
    counted = [p for p in PACKAGE.rglob("*.py") if p.parent.name != "zoo" and p.name not in BESIDE]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in counted) <= 12_099


def test_functions_stay_short():
    lengths = [
        (node.end_lineno - node.lineno + 1, f"{name}.{node.name}")
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    assert not [entry for entry in lengths if entry[0] > 60]
    (step,) = [length for length, name in lengths if name == "train.take_step"]
    assert step <= 28


def test_a_step_opens_few_files(tiny, tmp_path):
    """What a reader opens to follow a step of one process that no row is due after."""
    quiet = [
        "train.log_every=100",
        "train.eval_every=0",
        "train.save_every=0",
        "model.bigram_embed=0",
    ]
    config = load([*tiny, *quiet])[0]
    seen = set()

    def note(frame, *_):
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            seen.add(path.relative_to(PACKAGE).as_posix())

    world, watch = distributed.start("cpu"), Watch(0, Stopping())
    with RunDirectory(tmp_path / "run") as run:
        run.acquire(resume=False)
        trainer = Trainer(config, run, world, watch)
        trainer.begin()
        trainer.take_step()
        sys.settrace(note)
        try:
            trainer.take_step()
        finally:
            sys.settrace(None)
    top = {"train.py", "optim.py", "engine.py", "data.py", "model.py", "normuon.py"}
    assert seen == top | {"runtime/memory.py", "runtime/health.py"}

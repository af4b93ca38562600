"""The house: what an installed ragkv puts on the path, what importing it loads, and who may import whom."""

import ast
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import ragkv
from tests.fresh import fresh

ROOT = Path(__file__).parent.parent
HEAVY = {"triton", "faiss", "lmdb", "sentence_transformers", "pypdf"}


def test_import_is_light(warm):
    code = (
        "import torch, transformers, sys; before = set(sys.modules); import ragkv; "
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    loaded = set(ast.literal_eval(fresh(code, python=warm)))
    assert not loaded & HEAVY
    assert loaded <= {"ragkv"}


def test_fusion_runs_without_the_optional_packages():
    """Where triton, faiss, sentence-transformers and pypdf are not installed, an engine still works in memory."""
    blocked = {"faiss", "sentence_transformers", "pypdf", "triton", "lmdb"}
    code = (
        "import sys\n"
        f"for name in {sorted(blocked)}: sys.modules[name] = None\n"
        "import ragkv; from ragkv.testing import tiny_model\n"
        "engine = ragkv.Engine(tiny_model())\n"
        "print(engine.fuse(engine.add([[5, 6, 7]]), [4]).logits.shape[0])"
    )
    assert fresh(code) == "1"


def test_public_names():
    stub = ast.parse((ROOT / "ragkv" / "__init__.pyi").read_text())
    declared = {alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert declared == set(ragkv.__all__)
    for name in ragkv.__all__:
        assert getattr(ragkv, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        ragkv.nonsense  # noqa: B018


def test_type_checkers_are_shown_every_name():
    face = ast.walk(ast.parse((ROOT / "tests" / "typed" / "face.py").read_text()))
    used = {node.attr for node in face if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ragkv"}
    assert used == {*ragkv.__all__, "__version__"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("kernels", {"ragkv.kernels", "ragkv.errors"}),
        ("ragkv/folder", {"ragkv.folder", "ragkv.errors"}),
        ("ragkv/background.py", {"ragkv.forks"}),
        ("ragkv/forks.py", set()),
        ("ragkv/lazy.py", set()),
        ("store", {f"ragkv.{name}" for name in ("store", "folder", "chunk", "errors", "background", "forks", "lazy")}),
        (
            "retrieval",
            {"ragkv.retrieval", "ragkv.folder", "ragkv.chunk", "ragkv.errors", "ragkv.forks", "ragkv.tokenizer"},
        ),
    ],
)
def test_imports_go_one_way(room, allowed):
    for path in [ROOT / room] if room.endswith(".py") else (ROOT / room).rglob("*.py"):
        for name in imports(path):
            if name == "ragkv" or name.startswith("ragkv."):
                assert any(name == home or name.startswith(home + ".") for home in allowed), f"{path}: {name}"
            assert not (room in ("kernels", "store", "ragkv/folder") and name.split(".")[0] == "transformers"), path


def built(what: str, tmp_path: Path, *left_out: str) -> Path:
    """Builds from a copy: a build leaves folders behind that a later one would pick up."""
    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        symlinks=True,
        ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", *left_out),
    )
    run = subprocess.run(
        [sys.executable, "-m", "build", f"--{what}", "--no-isolation", "--outdir", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return source


def test_the_sdist_builds_and_tests(tmp_path):
    source = built("sdist", tmp_path, "*.pt")
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    rooms = ("ragkv", "kernels", "store", "retrieval", "tests", "docs", "examples", "benchmarks", "training")
    paths = [path for room in rooms for path in (source / room).rglob("*") if path.is_file() and path.name[0] != "."]
    assert {str(path.relative_to(source)) for path in [*paths, *source.glob("*.md")]} <= names
    assert {"Makefile", "constraints.txt", "pyproject.toml", "LICENSE"} <= names


def test_the_wheel_has_one_top_level_name(tmp_path):
    built("wheel", tmp_path, "tests", "benchmarks", "training")
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {name.split("/")[0] for name in names} == {"ragkv", f"ragkv-{ragkv.__version__}.dist-info"}
    for room, home in (
        ("ragkv", "ragkv"),
        ("kernels", "ragkv/kernels"),
        ("store", "ragkv/store"),
        ("retrieval", "ragkv/retrieval"),
    ):
        for path in (ROOT / room).rglob("*.py*"):
            if path.suffix != ".pyc":
                assert f"{home}/{path.relative_to(ROOT / room)}" in names, "pyproject.toml lists packages by name"
    assert "ragkv/py.typed" in names
    templates = {path.name for path in (ROOT / "ragkv/evaluation/report/templates").iterdir()}
    assert {"page.html.j2", "page.css.j2", "tables.md.j2"} < templates
    assert {f"ragkv/evaluation/report/templates/{name}" for name in templates} < set(names)
    assert any(name.startswith("ragkv/bundled/model/") and name.endswith(".safetensors") for name in names)
    assert any(name.startswith("ragkv/bundled/documents/") for name in names)
    assert {f"ragkv/bundled/{name}" for name in ("cases.jsonl.bz2", "foreign.txt", "questions.json")} < set(names)
    code = [name for name in names if name.startswith("ragkv/bundled/") and name.endswith(".py")]
    assert code == ["ragkv/bundled/__init__.py"], "what only builds the bundled world is in training/"
    packages = sysconfig.get_paths()["purelib"]
    assert not any((Path(packages) / name).exists() for name in ("kernels", "store", "retrieval"))

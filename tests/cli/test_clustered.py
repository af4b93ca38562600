"""--ray, as far as no cluster is needed; the rest is tests/distributed/test_precompute.py."""

import json
from contextlib import nullcontext

import pytest

from ragkv import RagKVError
from ragkv.cli.clustered import tell
from ragkv.distributed import Precomputed
from ragkv.library.done import Added
from ragkv.retrieval import SkippedFile

from .commands import run

pytestmark = pytest.mark.usefixtures("home")


def test_a_cluster_needs_a_pool_and_something_to_do(tmp_path, capsys):
    file = tmp_path / "a.md"
    file.write_text("A harbour.")
    code, _, err = run(capsys, "add", "--ray", "auto", file)
    assert code == 1 and "--ray needs --remote URL" in err and "pool" in err
    code, _, err = run(capsys, "add", "--ray", "auto", "--remote", "memory://x", "--dry-run", file)
    assert code == 1 and "--dry-run does nothing" in err
    code, _, err = run(capsys, "add", "--ray", "ray://head:10001", "--remote", "memory://x", file)
    assert code == 1 and "not through Ray's client" in err
    code, _, err = run(capsys, "add", "--workers", 2, file)
    assert code == 1 and "give --ray" in err
    assert not (tmp_path / "home").exists()


def test_without_ray_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    code, _, err = run(capsys, "add", "--ray", "auto", "--remote", "memory://x", tmp_path)
    assert code == 1 and "pip install 'ragkv[ray]'" in err


def test_where_no_cluster_answers_it_is_said_at_once(tmp_path, capsys):
    pytest.importorskip("ray")
    for address, why in (
        ("127.0.0.1:1", "refused"),
        ("127.0.0.1:one", "invalid literal"),
        ("nonsense", "Invalid address"),
    ):
        code, _, err = run(capsys, "add", "--ray", address, "--remote", "memory://x", tmp_path)
        assert code == 1 and f"no Ray cluster answers at {address}" in err and why in err


@pytest.fixture
def begun(monkeypatch):
    """What would be read on a cluster whose machines have GPUs."""
    given = {}
    monkeypatch.setattr("ragkv.cli.clustered._connected", lambda address: nullcontext())
    monkeypatch.setattr("ragkv.distributed.cluster.nodes", lambda: [{"CPU": 8.0, "GPU": 1.0}])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    pytest.importorskip("ray")

    def precompute(paths, **options):
        given.update(options)
        raise RagKVError("so far, so good")

    monkeypatch.setattr("ragkv.distributed.precomputing.precompute", precompute)
    return given


def test_workers_compute_where_this_machine_does(begun, tmp_path, capsys, monkeypatch):
    command = ("add", "--ray", "auto", "--remote", "memory://x", tmp_path)
    code, _, err = run(capsys, *command)
    assert code == 1 and "this machine has none" in err and not begun
    run(capsys, *command, "--weights", "int8", "--workers", 3, "--cpu-size", "1GiB")
    assert (begun["device"], begun["weights"], begun["model"], begun["workers"]) == ("cpu", "int8", "bundled", 3)
    assert begun["cpu_bytes"] == 1 << 30 and not begun.keys() & {"disk_bytes", "gpu_bytes", "quiet", "paths"}
    monkeypatch.setattr("ragkv.defaults.kept_in", lambda folder: {"model": "theirs", "weights": "int8"})
    begun.clear()
    run(capsys, *command)
    assert begun["device"] == "cpu" and "model" not in begun, "the folder's own holds"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("ragkv.defaults.kept_in", lambda folder: {})
    run(capsys, *command)
    assert begun["device"] == "cuda"


def test_what_was_read_on_a_cluster_is_added_here(begun, tmp_path, capsys, monkeypatch):
    (tmp_path / "a.md").write_text("A harbour.")
    before = Precomputed(failed={"/b.md": "given up"}, setting="theirs")
    monkeypatch.setattr("ragkv.distributed.precomputing.precompute", lambda paths, **options: before)
    command = (
        "add",
        "--json",
        "--ray",
        "auto",
        "--weights",
        "int8",
        "--remote",
        f"file://{tmp_path}/pool",
        tmp_path / "a.md",
    )
    code, out, err = run(capsys, *command)
    assert code == 0, err
    assert json.loads(out)["precomputed"]["failed"] == before.failed
    assert "/b.md: given up" in err and "do not read as this machine does" in err


def test_what_the_cluster_could_not_do_is_said(capsys):
    before = Precomputed(failed={"/a.pdf": "damaged", "/b.md": "given up"}, setting="theirs")
    tell(before, Added(skipped=[SkippedFile("/a.pdf", "damaged")]), "theirs")
    assert capsys.readouterr().err == "not read on the cluster but here: /b.md: given up\n"
    tell(Precomputed(setting="theirs"), Added(), "ours")
    assert "do not read as this machine does" in capsys.readouterr().err

"""What the command line says of itself and its machine, and takes from the standard input."""

import io
import json
import subprocess
import sys

import pytest

from ragkv.cli import info
from ragkv.cli.arguments import parser
from ragkv.retrieval import Catalogue
from ragkv.store import TieredStore
from tests.fresh import fresh

from .commands import run


def test_info_names_versions_machine_and_what_is_missing(tmp_path, capsys, monkeypatch):
    present = info._present
    monkeypatch.setattr("ragkv.cli.info._present", lambda module: module != "pypdf" and present(module))
    code, out, err = run(capsys, "info", "--path", tmp_path / "new")
    assert (code, err) == (0, "") and len(out.splitlines()) <= 24, "one screen"
    assert "ragkv 0.1.0" in out and "torch 2" in out and "kernels: " in out
    (pdf,) = [line for line in out.splitlines() if line.startswith("pdf ")]
    assert pdf.endswith("pip install 'ragkv[pdf]'")
    assert f"{tmp_path}/new: not there yet" in out and not (tmp_path / "new").exists()


def test_doctor_is_another_name_for_it(tmp_path, capsys):
    said = [run(capsys, command, "--path", tmp_path, "--json") for command in ("info", "doctor")]
    assert said[0] == said[1] and said[0][0] == 0


def test_info_knows_the_folder(tmp_path, capsys, monkeypatch):
    Catalogue(tmp_path / "documents").close()
    found = json.loads(run(capsys, "info", "--path", tmp_path, "--json")[1])
    assert found["folder"]["documents"] == 0 and found["folder"]["writable"]
    assert found["versions"]["ragkv"] and found["machine"]["cores"] >= 1 and "langchain" in found["extras"]
    monkeypatch.setattr("ragkv.cli.info.filesystem_of", lambda path: "nfs4")
    out = run(capsys, "info", "--path", tmp_path)[1]
    assert f"{tmp_path}: cannot be used: nfs4 is no local folder that can be read" in out
    (tmp_path / "file").write_text("")
    assert "cannot be used" in run(capsys, "info", "--path", tmp_path / "file")[1]


LIGHT = """
import sys

sys.modules["transformers"] = None
from ragkv.cli import main

for command in ("info", "docs", "ls", "stats", "verify", "compact", "prune --orphans --dry-run"):
    assert main([*command.split(), "--path", sys.argv[1]]) == 0, command
"""


def test_commands_that_load_no_model_do_without_transformers(tmp_path):
    """It takes seconds to import."""
    Catalogue(tmp_path / "documents").close()
    TieredStore(tmp_path / "kv").close()
    assert fresh(LIGHT, tmp_path)


def test_completion_knows_every_command(tmp_path, capsys, monkeypatch):
    code, script, _ = run(capsys, "completion", "bash")
    assert code == 0
    (tmp_path / "ragkv.sh").write_text(
        f'{script}\nCOMP_WORDS=(ragkv "$@"); COMP_CWORD=$#\n'
        '_shtab_ragkv ragkv "${!#}"; printf "%s\\n" "${COMPREPLY[@]}"\n'
    )

    def offered(*words):
        return subprocess.run(
            ["bash", tmp_path / "ragkv.sh", *words], capture_output=True, text=True, check=True, timeout=60
        ).stdout.split()

    commands = next(action for action in parser()._actions if action.dest == "command").choices
    assert set(offered("")) >= set(commands)
    assert offered("sy") == ["sync"] and "--dry-run" in offered("sync", "--d")
    monkeypatch.setitem(sys.modules, "shtab", None)
    code, _, err = run(capsys, "completion", "zsh")
    assert code == 1 and "pip install 'ragkv[completion]'" in err


@pytest.mark.parametrize(
    "text, question", [("Who?\n", "Who?"), ("Who built it,\nand when?\n", "Who built it,\nand when?")]
)
def test_question_from_the_standard_input(text, question, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert parser().parse_args(["ask", "-"]).question == question


def test_nothing_from_the_standard_input_is_no_question(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    with pytest.raises(SystemExit):
        parser().parse_args(["ask", "-"])
    assert "the question is blank" in capsys.readouterr().err

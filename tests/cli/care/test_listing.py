"""ls: what is there, filtered and sorted; and how commands are spelled."""

import json
import re

import pytest
import torch

from ragkv.cli import main
from ragkv.cli.arguments import parser
from ragkv.retrieval import Catalogue, Reading


def test_ls_shows_documents_and_passages(run, key):
    code, out, err = run("ls")
    lines = [re.split(r" {2,}", line.strip()) for line in out.splitlines()]
    assert code == 0
    assert lines[0] == ["id", "document", "passage", "tokens", "size", "tier", "codec", "age", "idle", "hits"]
    assert [line[1:4] for line in lines[1:4]] == [["a.md", "1", "30"], ["a.md", "2", "31"], ["a.md", "3", "33"]]
    assert [line[1:3] for line in lines[4:]] == [["b.md", "1"], ["(none)", "30"], ["(orphan)", "34"]] or [
        line[1:3] for line in lines[4:]
    ] == [["b.md", "1"], ["(orphan)", "34"], ["(none)", "30"]]
    assert {line[-4] for line in lines[1:]} == {"int8"} and {line[-5] for line in lines[1:]} == {"disk"}
    assert [line[-1] for line in lines[1:4]] == ["0", "1", "0"]
    assert key(1).hex().startswith(lines[2][0])
    assert re.fullmatch(r"Found 6 entries, [\d.]+ KiB on disk\.\n", err)


def test_ls_as_json(run, tmp_path):
    code, out, err = run("ls", "--json")
    found = json.loads(out)
    assert (code, err, found["found"], len(found["entries"])) == (0, "", 6, 6)
    shared = next(entry for entry in found["entries"] if entry["tokens"] == 33)
    assert shared["places"] == [
        {"source": str(tmp_path / "a.md"), "position": 2},
        {"source": str(tmp_path / "b.md"), "position": 1},
    ]
    assert (shared["tier"], shared["codec"], shared["space"], shared["expires_s"]) == ("disk", "int8", "model", None)
    assert found["bytes"] == sum(entry["bytes"] for entry in found["entries"])
    assert [entry["orphan"] for entry in found["entries"]].count(True) == 1


@pytest.mark.parametrize(
    ("filters", "numbers"),
    [
        (["tokens>31"], [2, 3, 4]),
        (["tokens>=31", "tokens<34"], [1, 2, 3]),
        (["hits=1"], [1]),
        (["hits!=1", "space=model"], [0, 2, 3, 4]),
        (["document=a.md"], [0, 1, 3]),
        (["document=*.md"], [0, 1, 2, 3]),
        (["document!=*.md"], [4, 9]),
        (["space=other*"], [9]),
        (["codec=raw"], []),
        (["age<1h", "idle<1d", "cost<=1s"], [0, 1, 2, 3, 4, 9]),
        (["age>7d"], []),
        (["size<1GiB"], [0, 1, 2, 3, 4, 9]),
        (["size>1MB"], []),
        (["id=KEY2*"], [2]),
    ],
)
def test_filters(run, filters, numbers, key):
    arguments = [part for text in filters for part in ("--filter", text.replace("KEY2", key(2).hex()[:20]))]
    code, out, _ = run("ls", "--quiet", *arguments)
    assert code == 0
    assert sorted(out.split()) == sorted(key(number).hex() for number in numbers)


def test_sort_and_limit(run, key):
    assert run("ls", "-q", "--sort", "tokens", "--limit", 2)[1].split() == [key(4).hex(), key(3).hex()]
    assert run("ls", "-q", "--sort", "tokens:asc")[1].split()[-1] == key(4).hex()
    assert run("ls", "-q", "--sort", "id")[1].split() == sorted(key(number).hex() for number in (0, 1, 2, 3, 4, 9))
    assert "6 entries, 1 shown" in run("ls", "--limit", 1)[2]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["ls", "--filter", "weight>3"], "fields: size, tokens"),
        (["ls", "--filter", "size"], "a filter is FIELD"),
        (["ls", "--filter", "size>big"], "a size, as 500MB or 2GiB; got 'big'".replace(";", ",")),
        (["ls", "--filter", "age>7 parsecs"], "a time, as 12h or 7d"),
        (["ls", "--filter", "codec>raw"], "compared with = or !="),
        (["ls", "--sort", "size:up"], "FIELD:asc or FIELD:desc"),
        (["ls", "--limit", "-1"], "whole number"),
        (["rm"], "ID|DOCUMENT"),
        (["prune"], "say what goes: --filter, --orphans or --max-size"),
        (["prune", "--max-size", "some"], "a size"),
        (["export"], "FILE"),
        (["verify", "--fix"], "unrecognized arguments"),
    ],
)
def test_usage_errors_exit_with_2(folder, argv, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err


def test_sizes_and_times():
    arguments = parser().parse_args(["prune", "--max-size", "1.5GiB", "-f", "idle>2w"])
    assert arguments.max_size == 3 << 29
    assert arguments.filters[0].value == 14 * 86_400
    assert parser().parse_args(["import", "x", "--disk-size", "2GB"]).disk_size == 2_000_000_000


@pytest.mark.parametrize(
    "argv", [["ls"], ["rm", "x"], ["prune", "--orphans"], ["verify"], ["compact"], ["export", "f"]]
)
def test_no_folder(argv, tmp_path, capsys):
    assert main([*argv, "--path", str(tmp_path / "nowhere")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ragkv: no stored KV in ") and err.count("\n") == 1
    assert not (tmp_path / "nowhere").exists()


def test_names_are_not_obeyed_by_the_terminal(run, folder, key):
    with Catalogue(folder / "documents") as catalogue:
        reading = Reading("ab" * 32, [key(0)], b"")
        catalogue.put("\x1b[2Jevil.md", ["alpha one"], lambda many: torch.ones(len(many), 4).numpy(), reading=reading)
    out = run("ls")[1]
    assert "\x1b" not in out and "?[2Jevil.md" in out

"""add, ask, stats and demo, with the bundled model and the offline embedder."""

import io
import json
import re
import signal
import subprocess
import sys

import pytest
import torch

from ragkv import RAG, bundled
from ragkv.cli import main
from ragkv.testing import tiny_model
from tests.retrieval.files import PARSER, pptx

from .commands import run

LOAD = bundled.load

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("blackstead.md", "clearport.md"):
        (folder / name).write_text(bundled.documents()[name])
    return folder


def test_letters_that_the_terminal_has_not(tmp_path, capsys, monkeypatch):
    file = tmp_path / "\u6f22\U0001f600\xe9.md"
    file.write_text("Clearport lies on the river Exe.")
    assert run(capsys, "add", file)[0] == 0
    for name, command in ((r"\u6f22\U0001f600\xe9.md", ["docs"]), (file.name, ["docs", "--json"])):
        written = io.TextIOWrapper(io.BytesIO(), "ascii")
        monkeypatch.setattr("sys.stdout", written)
        assert main(command) == 0
        said = written.buffer.getvalue().decode()
        assert name in (json.loads(said)["documents"][0]["source"] if "--json" in command else said)


def test_add_ask_stats(files, tmp_path, capsys):
    (files / "picture.png").write_bytes(b"\x89PNG\0\xff")
    (files / ".draft.md").write_text("Not yet.")
    code, out, err = run(capsys, "add", files)
    assert code == 0
    assert out.startswith("documents: 2 added, 1 skipped (1 hidden one left out); ") and " tokens read in " in out
    to_read, skipped = err.splitlines()
    assert re.fullmatch(r"to read: \d+ tokens, about 1\.\d MiB of KV", to_read) and out.endswith(" MiB of KV on disk\n")
    assert skipped == f"skipped {files}/picture.png: binary"

    code, out, _ = run(capsys, "add", files, "--json")
    added = json.loads(out)
    assert added["hidden"] == 1
    assert (code, added["tokens_read"], added["documents"]) == (
        0,
        0,
        {"added": 0, "changed": 0, "moved": 0, "unchanged": 2},
    )
    assert added["skipped"] == [{"source": f"{files}/picture.png", "reason": "binary"}]

    (files / "clearport.md").write_text((files / "clearport.md").read_text() + " One more sentence.")
    code, out, _ = run(capsys, "add", files / "clearport.md")
    assert code == 0 and out.startswith("documents: 1 changed; ")

    question = "On which river does Clearport lie?"
    code, out, _ = run(capsys, "ask", question, "--top-k", 2, "--max-new-tokens", 8)
    answer, *_ = out.splitlines()
    assert code == 0
    assert f"{files}/clearport.md" in out and "  disk\n" in out and "  cpu\n" not in out and "first token after" in out
    spent, tokens = re.search(r"recomputed\n([\d.]+)% of ([\d,]+) passage tokens, by RelevantTokens", out).groups()

    code, out, _ = run(
        capsys, "ask", question, "--top-k", 2, "--max-new-tokens", 8, "--json", "--method", "lego-link:k=4"
    )
    found = json.loads(out)
    assert code == 0 and found["question"] == question
    assert (
        found["report"]["fusion"]["budget"] > float(spent) / 100 == 0 < int(tokens)
    )  # one document: nothing to repair
    assert found["report"]["fusion"]["method"] == "LegoLink(k=4)"
    assert len(found["sources"]) == 2 and {source["kv"] for source in found["sources"]} == {"disk"}
    assert found["left_out"] == []
    assert found["report"].keys() == {"fusion", "new_tokens", "ran"} and "milliseconds" not in found["report"]["fusion"]
    times = found["milliseconds"]
    assert times["retrieve"] > 0 and times["retrieve"] + times["compute"] < times["first_token"] < times["total"]

    code, out, _ = run(capsys, "ask", question, "--top-k", 2, "--max-new-tokens", 8, "--json")
    assert json.loads(out)["answer"] == answer

    code, out, _ = run(capsys, "stats", "--json")
    stats = json.loads(out)
    assert code == 0 and stats["documents"] == 2 and stats["path"] == str(tmp_path / "home" / "default")
    assert stats["store"]["tiers"]["disk"]["entries"] == stats["passages"] > 2
    code, out, _ = run(capsys, "stats")
    assert code == 0 and out.startswith("2 documents, ") and "embedder: all-MiniLM-L6-v2" in out


def test_sync_and_docs(files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "add", "files")[0] == 0
    (files / "clearport.md").rename(files / "harbour.md")
    (files / "blackstead.md").unlink()
    (files / "new.md").write_text("Harps are made in Wye.")
    (files / ".draft.md").write_text("Not yet.")
    code, out, _ = run(capsys, "sync", "files", "--dry-run")
    lines = ["added    files/new.md", "removed  files/blackstead.md", "moved    files/clearport.md -> files/harbour.md"]
    assert code == 0 and out.splitlines()[:3] == lines
    assert re.fullmatch(
        r"documents: 1 added, 1 moved, 1 removed \(1 hidden one left out\); \d+ tokens to read; nothing was done",
        out.splitlines()[3],
    )
    code, out, _ = run(capsys, "sync", "files")
    assert code == 0 and out.splitlines()[:3] == lines and out.endswith(" of KV on disk\n")
    code, out, _ = run(capsys, "docs")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == [
        "document",
        "files/harbour.md",
        "files/new.md",
    ]
    code, out, _ = run(capsys, "sync", "files", "--json")
    said = json.loads(out)
    assert (said["tokens"], said["hidden"], said["unchanged"]) == (
        0,
        1,
        [str(files / "harbour.md"), str(files / "new.md")],
    )
    assert json.loads(run(capsys, "docs", "--json")[1])["documents"][0]["tokens"] > 100
    code, out, err = run(capsys, "sync", "nowhere")
    assert (code, out) == (1, "") and "'nowhere' is no folder that is there" in err
    code, out, _ = run(capsys, "forget", "files/*.md", "--yes")
    assert code == 0 and out.splitlines()[-1].startswith("removed 2 documents, ")


def test_progress_is_shown_where_it_is_wanted(files, tmp_path, capsys):
    """Not on what is no terminal, unless it is asked for; and what is read again is named, with the reason."""
    code, _, err = run(capsys, "add", files, "--progress", "--json")
    assert code == 0 and "reading: 100%" in err.replace("\r", "\n") and "clearport.md" in err and "tokens/s" in err
    question = ("ask", "On which river does Clearport lie?", "--top-k", 2, "--max-new-tokens", 4)
    assert run(capsys, *question)[2] == "", "nothing was read"
    assert run(capsys, "prune", "--max-size", 0, "--yes")[0] == 0
    code, _, err = run(capsys, *question)
    first, *again = err.splitlines()
    assert re.fullmatch(r"to read: \d+ tokens", first)
    assert again and all(re.fullmatch(r"reading \S+\.md again: its KV are not in the store", line) for line in again)
    assert run(capsys, "prune", "--max-size", 0, "--yes")[0] == 0
    assert run(capsys, *question, "--json")[2] == ""
    code, out, err = run(capsys, "refresh")
    assert code == 0 and re.match(r"[1-9]\d* tokens read in ", out) and err.startswith("to read: ")
    assert run(capsys, "refresh")[1].startswith("0 tokens read")
    assert json.loads(run(capsys, "refresh", "--json")[1])["tokens_read"] == 0


def test_an_interrupted_add_says_how_to_go_on(files, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(RAG, "add_files", interrupted)
    code, _, err = run(capsys, "add", files)
    assert code == 130
    assert err == "ragkv: interrupted: what was read is kept, and the same command goes on from there\n"


def test_a_real_interrupt_keeps_what_was_read(interruptible, warm, tmp_path):
    """SIGINT in the middle of one long document; the second time only the rest of it is read."""
    (tmp_path / "long.md").write_text("\n\n".join(bundled.documents().values()))
    argv = [*warm, "-m", "ragkv.cli", "add", "long.md", "--method", "reuse", "--progress"]
    first = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    said = b""
    while not re.search(rb"reading: +[1-9]\d?%", said):  # a first piece is read, and there are more
        said += first.stderr.read1()
        assert first.poll() is None, said.decode()
    first.send_signal(signal.SIGINT)
    out, rest = first.communicate()
    assert (first.returncode, out) == (130, b""), (said + rest).decode()
    assert rest.decode().splitlines()[-1] == (
        "ragkv: interrupted: what was read is kept, and the same command goes on from there"
    )
    second = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    found = [re.search(r"to read: ([\d,]+) tokens", text) for text in (said.decode(), second.stderr)]
    assert all(found), (said.decode(), second.stderr)
    before, now = (int(one[1].replace(",", "")) for one in found)
    assert 200 < before - now < before
    read = int(re.search(r"([\d,]+) tokens read in ", second.stdout)[1].replace(",", ""))
    assert now - before // 5 < read <= now  # what is said is what the model runs, some of which is stored already


def test_numbers_and_budgets(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ragkv.bundled.load", LOAD)
    sizes = {}
    for name, argv in {"fp32": [], "bf16": ["--dtype", "bfloat16"], "int8": ["--codec", "int8"]}.items():
        code, out, _ = run(capsys, "add", files, "--path", tmp_path / name, "--json", *argv, "--disk-bytes", "1GiB")
        assert code == 0
        sizes[name] = json.loads(out)["kv_bytes"]["disk"]
    assert sizes["int8"] < sizes["bf16"] < sizes["fp32"]


def test_add_measures_with_a_text_of_your_own(files, tmp_path, capsys):
    (tmp_path / "foreign.txt").write_text("Rivers and harps, and what they cost.")
    found = []
    for name, argv in (("plain", []), ("own", ["--foreign", tmp_path / "foreign.txt"])):
        assert run(capsys, "add", files, "--path", tmp_path / name, *argv)[0] == 0
        with RAG.from_pretrained(path=tmp_path / name) as rag:
            chunk = rag.chunks(rag.retrieve("On which river does Clearport lie?", 1))[0]
            found.append(rag.engine.store.get(rag.engine.documents.key(chunk)).sensitivity)
    assert not torch.equal(*found)


def test_a_terminal_is_told_once_that_the_bundled_model_is_a_toy(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    add = ("add", files / "clearport.md", "--no-progress", "--path")
    said = [run(capsys, *add, path, *more)[2] for path, *more in ((tmp_path / "a", "--json"), (tmp_path / "b",))]
    assert "toy" not in said[0]
    (line,) = [line for line in said[1].splitlines() if "toy" in line]
    assert "--model Qwen/Qwen3-0.6B" in line
    assert "toy" not in run(capsys, *add, tmp_path / "b")[2] + run(capsys, "refresh", "--path", tmp_path / "b")[2]
    assert "toy" not in run(capsys, *add, tmp_path / "c", "--model", "bundled")[2]


def test_nothing_could_be_added(tmp_path, capsys):
    code, out, err = run(capsys, "add", tmp_path / "missing.txt", "--path", tmp_path / "kv")
    assert code == 1
    assert re.fullmatch(r"documents: 1 skipped; 0 passages; 0 tokens read in [\d.]+ s\n", out), "there are no KV"
    assert err.splitlines()[0] == f"skipped {tmp_path}/missing.txt: cannot be read: No such file or directory"
    code, _, err = run(capsys, "ask", "What?", "--path", tmp_path / "kv")
    assert (code, err.count("\n")) == (1, 1) and "no documents yet" in err


def test_failures_are_one_line(files, tmp_path, capsys):
    code, out, err = run(capsys, "add", files, "--model", tmp_path / "no-model")
    assert (code, out, err.count("\n")) == (1, "", 1) and "no-model" in err
    code, out, err = run(capsys, "add", files, "--embedder", tmp_path / "no-embedder")
    assert (code, out, err.count("\n")) == (1, "", 1) and "no-embedder" in err
    (tmp_path / "a-file").write_text("")
    code, out, err = run(capsys, "add", files, "--path", tmp_path / "a-file")
    assert (code, out, err.count("\n")) == (1, "", 1) and "a-file" in err


def test_demo_starts_warm_the_second_time(tmp_path, capsys):
    code, out, err = run(capsys, "demo", "--questions", 3)
    assert code == 0
    assert out.startswith("Read 36 documents, ") and "they are on disk now" in out
    assert out.count("full prefill ") == 3 + 2  # each question, and twice in the summary
    assert " 3 of 3 right (full prefill of the same passages: 3)" in out
    (folder,) = (tmp_path / "home").iterdir()
    assert err == f"documents, vectors and KV are in {folder}\n"

    plain = ("--top-k", 5, "--neighbours", 1, "--no-hybrid", "--hops", 1)
    code, out, _ = run(capsys, "demo", "--questions", 3, *plain)
    assert code == 0 and " 2 of 3 right " in out
    assert (
        "Winwich, not among the passages; full prefill: wrong too)" in out
        and "because the answer was not retrieved: 1 of 1." in out
    )

    code, out, _ = run(capsys, "demo", "--questions", 3, "--json", *plain)
    found = json.loads(out)
    assert code == 0
    assert (found["read"]["documents"], found["read"]["tokens_read"]) == (36, 0)
    assert found["summary"]["questions"] == 3
    for turn in found["questions"]:
        assert set(turn["kv"]) <= {"disk", "cpu"}
        assert len(turn["kv"]) == len(turn["sources"]) >= 5  # five are found, their neighbours come along
        assert turn["right"] == (turn["answer"].lower() == turn["expected"].lower())
        assert turn["retrieved"] or not turn["right"]
        assert 0 < turn["computed_tokens"] < turn["prompt_tokens"]
        assert turn["first_token_ms"] > 0 and turn["full_prefill_ms"] > 0
    assert "disk" in found["questions"][0]["kv"]
    # The third rests on a passage that retrieval misses.
    assert [turn["retrieved"] for turn in found["questions"]] == [True, True, False]
    assert found["summary"]["wrong_not_retrieved"] == 1

    code, out, _ = run(capsys, "demo", "--questions", 1)
    assert code == 0 and out.startswith("Warm start: 36 documents found on disk, 0 tokens read.")


def test_demo_on_another_model(tmp_path, capsys):
    """A folder of its own; a random model's answers hold nothing, and everything else is as with the bundled one."""
    _, tokenizer = bundled.load()
    tiny_model(vocab_size=1792).save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    code, out, err = run(capsys, "demo", "--questions", 1, "--json", "--model", tmp_path / "mine")
    found = json.loads(out)
    assert found["machine"].startswith("float32 on ") and err == ""
    assert code == 0 and found["read"]["documents"] == 36 and found["read"]["tokens_read"] > 0
    assert found["read"]["path"].endswith("/demo-mine")
    (turn,) = found["questions"]
    assert turn["right"] == (turn["expected"].lower() in turn["answer"].lower())
    assert 0 < turn["computed_tokens"] < turn["prompt_tokens"]


def test_demo_in_another_dtype(tmp_path, capsys, monkeypatch):
    """On a CPU half precision may be the slow one: said before documents are read, unless it was asked for."""
    few = dict(list(bundled.documents().items())[:3])
    monkeypatch.setattr(bundled, "documents", lambda: few)
    _, tokenizer = bundled.load()
    tiny_model(vocab_size=1792).bfloat16().save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    asked = ("demo", "--questions", 1, "--model", tmp_path / "mine", "--path", tmp_path / "kv")
    code, out, err = run(capsys, *asked)
    assert code == 0 and "bfloat16 on " in out and err.startswith("bfloat16 on ") and "--dtype float32" in err
    code, out, err = run(capsys, *asked, "--dtype", "float32")
    assert code == 0 and "float32 on " in out and "--dtype" not in err


def test_ask_finds_as_it_is_told(files, tmp_path, capsys):
    with RAG.from_pretrained(path=tmp_path / "home" / "default") as rag:
        rag.add_texts([bundled.documents()["kingstead.md"]], ["kingstead"], [{"kind": "town", "year": 1950}])
    assert run(capsys, "add", files)[0] == 0

    def asked(*options):
        code, out, err = run(capsys, "ask", "What grows in Blackstead?", "--json", "--max-new-tokens", 1, *options)
        assert code == 0, err
        return {hit["source"].rpartition("/")[2] for hit in json.loads(out)["sources"]}, json.loads(out)["sources"]

    assert asked("--top-k", 9)[0] == {"blackstead.md", "clearport.md", "kingstead"}
    for where in (
        "kind=town",
        "year>=1950",
        "year<1951",
        "source!=*.md",
        '{"year": [1, 1950]}',
        "year=[1950]",
        "source=king*",
        '{"source": {"$ne": "*.md"}, "year": 1950}',
    ):
        assert asked("--where", where)[0] == {"kingstead"}, where
    assert asked("--top-k", 9, "--where", '{"source": {"$ne": "king*"}, "$not": {"year": 1950}}')[0] == {
        "blackstead.md",
        "clearport.md",
    }
    assert asked("--where", f"source={files}")[0] == {"blackstead.md", "clearport.md"}
    assert asked("--where", "source=*.md", "--where", f"source!={files}/clearport.md")[0] == {"blackstead.md"}
    hits = asked("--hybrid", "--hops", 2, "--top-k", 1)[1]
    assert "blackstead.md" in hits[0]["source"]
    scores = {
        order: [hit["score"] for hit in asked("--order", order)[1]] for order in ("document", "retrieved", "best-last")
    }
    assert scores["document"] == [hit["score"] for hit in asked()[1]] != scores["retrieved"]
    assert scores["retrieved"] == sorted(scores["retrieved"], reverse=True) == scores["best-last"][::-1]
    best = max(hit["score"] for hit in asked()[1])
    assert [hit["score"] for hit in asked("--min-score", best)[1]] == [best]
    assert 1 <= len(asked("--max-context-tokens", 150)[1]) < 5 < len(asked("--max-context-tokens", 5000)[1])

    for options, message in (
        (["--where", "kind=nothing"], "no passage was found"),
        (["--where", "source=blackstad.md"], "no document is called 'blackstad.md': did you mean"),
        (["--where", '{"year": {"$near": 3}}'], "'year' takes a value"),
        (["--rerank", str(tmp_path / "nowhere")], "cannot be loaded"),
    ):
        code, out, err = run(capsys, "ask", "What grows?", *options)
        assert (code, out, err.count("\n")) == (1, "", 1) and message in err


def test_passages_of_the_same_text_are_named(files, capsys):
    for name in ("copy.md", "third.md"):
        (files / name).write_text(bundled.documents()["blackstead.md"])
    assert run(capsys, "add", files)[0] == 0
    asked = ("ask", "What grows in Blackstead?", "--max-new-tokens", 1)
    assert re.search(r"blackstead\.md.* \(the same in .*copy\.md.* and 1 more\)", run(capsys, *asked)[1])
    sources = json.loads(run(capsys, *asked, "--json")[1])["sources"]
    copies = [tuple(copy["source"].rpartition("/")[2] for copy in hit["copies"]) for hit in sources]
    assert ("copy.md", "third.md") in copies and len({hit["text"] for hit in sources}) == len(sources)


def test_as_a_program(tmp_path):
    """The real thing in its own process: exit code, one line, no traceback."""
    argv = [sys.executable, "-m", "ragkv.cli", "ask", "What?", "--path", str(tmp_path / "nowhere")]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ragkv: no documents in ") and done.stderr.count("\n") == 1


def test_pages_headings_and_encodings(tmp_path, capsys):
    text = "# Rivers\n\n## Clearport\n\nClearport lies on the river Taint, says Jürg.\n"
    (tmp_path / "old.md").write_bytes(text.encode("cp850"))
    (tmp_path / "slides.pptx").write_bytes(pptx(("Harbours", "Greywater lies on the lake."), ("Rivers", "Wye is dry.")))
    with pytest.raises(SystemExit, match="2"):
        run(capsys, "add", tmp_path, "--encoding", "klingon")
    assert "encoding must be one that Python knows, got 'klingon'; it knows ascii" in capsys.readouterr().err
    assert run(capsys, "add", tmp_path / "old.md", tmp_path / "slides.pptx", "--encoding", "cp850")[0] == 0
    synced = json.loads(run(capsys, "sync", tmp_path, "--encoding", "cp850", "--json")[1])
    assert len(synced["unchanged"]) == 2 and synced["tokens"] == 0
    _, out, _ = run(capsys, "ask", "On which river does Clearport lie?", "--max-new-tokens", 2)
    assert f"{tmp_path}/old.md, Rivers > Clearport" in out and f"{tmp_path}/slides.pptx, page 1, Harbours" in out
    _, out, _ = run(capsys, "ask", "On which river does Clearport lie?", "--max-new-tokens", 2, "--json")
    sources = json.loads(out)["sources"]
    assert {(source["page"], source["heading"]) for source in sources} == {
        (None, "Rivers > Clearport"),
        (1, "Harbours"),
    }
    assert any("says Jürg." in source["text"] for source in sources)


def test_ctrl_c_while_files_are_converted(interruptible, tmp_path, monkeypatch, capsys):
    (tmp_path / "parser").mkdir()
    (tmp_path / "parser" / "pypdf.py").write_text(PARSER)
    monkeypatch.syspath_prepend(tmp_path / "parser")
    files = {name: tmp_path / f"{name}.pdf" for name in "abc"}
    for name, file in files.items():
        file.write_text("ctrl-c" if name == "b" else f"File {name}.")
    code, _, err = run(capsys, "add", *files.values())
    assert code == 130 and err == "ragkv: interrupted: what was read is kept, and the same command goes on from there\n"
    assert len(list(tmp_path.rglob(".converted/*"))) == 1
    files["b"].write_text("File b.")
    code, out, _ = run(capsys, "add", *files.values())
    assert code == 0 and out.startswith("documents: 3 added")


def test_ask_ends_before_a_text(files, capsys):
    run(capsys, "add", files)
    question = "Where is the Harbour Office?"
    whole = json.loads(run(capsys, "ask", question, "--json", "--max-new-tokens", 8)[1])["answer"]
    ends = ["never met", whole[3:6]]
    code, out, _ = run(
        capsys, "ask", question, "--json", "--max-new-tokens", 8, *(x for end in ends for x in ("--stop", end))
    )
    assert code == 0 and json.loads(out)["answer"] == whole[: whole.index(ends[1])].strip()
    assert len(whole) > 6

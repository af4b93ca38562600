"""``ragkv eval`` as it is typed."""

import json
import signal
import sys

import pytest

from ragkv import bundled
from ragkv.chunk import digest
from ragkv.cli import main
from ragkv.cli.arguments import parser
from ragkv.evaluation import GateError, parse_arms
from ragkv.testing import tiny_model


@pytest.fixture(autouse=True)
def shared(loaded, monkeypatch):
    monkeypatch.setattr("ragkv.bundled.load", lambda: loaded)


def run(capsys, *argv):
    code = main(["eval", *map(str, argv)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "cases.jsonl"
    record = {
        "question": "Which river does it lie on?",
        "documents": [["Draycliff is a town."], ["It lies on the Tees."]],
    }
    rows = [{**record, "id": "a", "answers": ["Tees"]}, {**record, "id": "b", "answers": []}]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_rows_table_and_page(data, tmp_path, capsys):
    argv = (
        "--data",
        data,
        "--out",
        tmp_path / "out",
        "--arms",
        "full-prefill",
        "reuse",
        "--timed",
        0,
        "--max-new-tokens",
        4,
    )
    code, out, err = run(capsys, *argv)
    assert (code, err) == (0, "")
    assert out.count("gate passed: ") == 5 and out.index("gate passed") < out.index("reuse@alone")
    assert "left out: 1 case, no answer" in out and f"report: {tmp_path}/out/report.html" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "rows.jsonl",
        "settings.json",
        "summary.json",
        "report.html",
        "tables.md",
    }

    quoted = (tmp_path / "out" / "tables.md").read_text()
    assert "| `reuse@alone` | 1 |" in quoted and "`ragkv " in quoted

    code, out, err = run(capsys, *argv, "--json")
    found = json.loads(out)
    assert code == 0 and err.count("gate passed: ") == 5
    assert [arm["name"] for arm in found["arms"]] == ["full-prefill", "reuse@alone", "reuse@document"]
    assert found["left_out"] == {"no answer": 1} and found["data"] == "cases.jsonl (ragkv)"


def test_your_own_model_and_foreign_text(data, loaded, tmp_path, capsys):
    tiny_model(vocab_size=1792).save_pretrained(tmp_path / "model")
    loaded[1].save_pretrained(tmp_path / "model")
    (tmp_path / "foreign.txt").write_text("Rivers and harps, and what they cost.")
    argv = ["--model", tmp_path / "model", "--data", data, "--out", tmp_path / "out", "--max-new-tokens", 2, "--json"]
    argv += ["--arms", "full-prefill", "sensitive-tokens:ratio=0.2@document"]
    code, out, _ = run(capsys, *argv, "--foreign", tmp_path / "foreign.txt")
    found = json.loads(out)
    assert code == 0 and found["model"] == str(tmp_path / "model")
    assert found["arms"][1]["cost"].keys() >= {"bytes_read", "kv_bytes", "cold_read_ms", "disk_ms", "stages_ms"}
    code, out, err = run(capsys, *argv)
    assert (code, out, err.count("\n")) == (1, "", 1) and "other settings (foreign: " in err


def test_sigterm_ends_as_ctrl_c_does_with_a_report(tmp_path, capsys, monkeypatch):
    def progress(items, what):
        yield items[0]
        signal.raise_signal(signal.SIGTERM)
        yield from items[1:]

    monkeypatch.setattr("ragkv.cli.eval._progress", progress)
    before = signal.getsignal(signal.SIGTERM)
    argv = ("--limit", 2, "--orders", 1, "--arms", "full-prefill", "reuse@document", "--max-new-tokens", 4)
    code, out, err = run(capsys, *argv, "--out", tmp_path / "out")
    assert (code, err) == (130, "") and "stopped after 1 case of 2; the same command goes on from there" in out
    assert "1 of 2 cases asked" in (tmp_path / "out" / "report.html").read_text()
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.setattr("ragkv.cli.eval._progress", lambda items, what: items)
    code, out, err = run(capsys, *argv, "--out", tmp_path / "out", "--timed", 0)
    assert (code, err) == (0, "") and "stopped" not in out


def test_without_answers_kl_is_drawn(data, tmp_path, capsys):
    argv = ("--data", data, "--out", tmp_path / "out", "--arms", "full-prefill", "reuse@alone", "--timed", 0)
    code, out, err = run(capsys, *argv, "--max-new-tokens", 0)
    assert (code, err) == (0, "") and "KL, chunks by kind of question" in out
    code, _, err = run(capsys, *argv, "--max-new-tokens", 0, "--instruction", "Be brief.")
    assert code == 1 and "instruction: None there, 'Be brief.' now" in err


def test_jobs_change_nothing_but_the_times(tmp_path, capsys):
    def rows(jobs):
        argv = ("--limit", 3, "--orders", 2, "--arms", "full-prefill", "reuse", "--timed", 0, "--max-new-tokens", 4)
        code, _, err = run(capsys, *argv, "--jobs", jobs, "--out", tmp_path / str(jobs))
        assert (code, err) == (0, "")
        made = map(json.loads, (tmp_path / str(jobs) / "rows.jsonl").read_text().splitlines())
        return [(row["case"], row["order"], row["arm"], row["answer"], row["em"], row["budget"]) for row in made]

    assert rows(2) == rows(1)


def test_the_bundled_data(tmp_path, capsys):
    argv = ("--limit", 2, "--orders", 1, "--arms", "full-prefill", "--timed", 0, "--out", tmp_path / "out", "--json")
    code, out, _ = run(capsys, *argv)
    assert code == 0 and json.loads(out)["slices"] == {"all": 2, "direct": 1, "local": 1}
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["foreign"] == digest(bundled.foreign()).hex()[:16]  # the bundled model's own, unless one is given


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("--arms", "magic"), "no arm 'magic'. Besides methods there are: full-prefill,"),
        (("--metric", "beauty"), "no metric 'beauty'; there are: em, f1,"),
        (("--metric", "same_chunks", "--max-new-tokens", "0"), "same_chunks is counted of answers"),
        (("--metric", "longbench"), "longbench is counted of LongBench's data sets alone"),
        (("--data", "/nowhere/x.jsonl"), "/nowhere/x.jsonl"),
        (("--model", "/nowhere/model"), "/nowhere/model"),
    ],
)
def test_failures_are_one_line(argv, reason, tmp_path, capsys):
    code, out, err = run(capsys, *argv, "--out", tmp_path / "out")
    assert (code, out, err.count("\n")) == (1, "", 1) and reason in err
    assert not (tmp_path / "out").exists()


def test_without_jinja2_nothing_is_begun(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, out, err = run(capsys, "--data", data, "--out", tmp_path / "out")
    assert (code, out, err.count("\n")) == (1, "", 1) and "the report needs jinja2: pip install 'ragkv[report]'" in err
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_refused_is_one_line(data, loaded, tmp_path, capsys):
    """GPT-2 has learned absolute positions: nothing can be moved, so nothing is scored."""
    from transformers import GPT2Config, GPT2LMHeadModel

    small = GPT2Config(vocab_size=1792, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(small).save_pretrained(tmp_path / "gpt2")
    loaded[1].save_pretrained(tmp_path / "gpt2")
    argv = ("--model", tmp_path / "gpt2", "--data", data, "--out", tmp_path / "out", "--arms", "reuse")
    code, out, err = run(capsys, *argv)
    assert (code, out, err.count("\n")) == (1, "", 1) and "position" in err
    assert not (tmp_path / "out").exists()


def test_an_unknown_form_shows_its_first_line(tmp_path, capsys):
    (tmp_path / "odd.csv").write_text("question;answer\n")
    code, _, err = run(capsys, "--data", tmp_path / "odd.csv", "--out", tmp_path / "out")
    assert code == 1 and "begins with 'question;answer'" in err and "LongBench (input, context, answers)" in err


def test_three_orders_and_several_budgets_unless_others_are_asked_for():
    args = parser().parse_args(["eval"])
    assert (args.orders, args.arms, args.model, args.data, args.foreign) == (3, ["default"], "bundled", "bundled", None)
    assert len(args.budgets) == 4 and {arm.name for arm in parse_arms(args.arms, args.budgets)} >= {
        f"sensitive-tokens:ratio={budget:g}@document" for budget in args.budgets
    }


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("--limit", "0"), "at least 1, got '0'"),
        (("--jobs", "0"), "at least 1, got '0'"),
        (("--budgets", "15"), "a share from 0 to 1, got '15'"),
        (("--seed", "-1"), "at least 0"),
        (("--out", ""), "must be a folder, got ''"),
        (("--foreign", "/nowhere/text"), "'/nowhere/text' is no text file in UTF-8: "),
        (("--foreign", "/dev/null"), "'/dev/null' holds no text"),
    ],
)
def test_usage_errors(argv, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["eval", *argv])
    assert stopped.value.code == 2 and reason in capsys.readouterr().err


def test_a_failing_gate_ends_with_exit_code_1(tmp_path, capsys, monkeypatch):
    def fails(*args):
        raise GateError("gate '100 % = full prefill' failed")
        yield

    monkeypatch.setattr("ragkv.evaluation.run.run_gates", fails)
    code, out, err = run(capsys, "--limit", 1, "--out", tmp_path / "out")
    assert (code, out) == (1, "") and "gate '100 % = full prefill' failed" in err


@pytest.mark.parametrize(
    ("arm", "passes", "neighbours"), [("reuse", 1, 0), ("reuse@neighbours", 1, 1), ("sensitive-tokens@document", 2, 0)]
)
def test_documents_are_read_as_its_arms_need_them(data, tmp_path, capsys, monkeypatch, arm, passes, neighbours):
    """Behind their neighbours, and a second time for their tokens' sensitivity, only where an arm asks for it."""

    def stopped(bench, plan, *_, **__):
        assert bench.engine.documents.passes == passes
        assert all(len(behind) == neighbours for case in plan.cases for behind in case.behind or ((),))
        raise GateError("looked at")

    monkeypatch.setattr("ragkv.cli.eval.evaluate", stopped)
    code, _, err = run(capsys, "--data", data, "--out", tmp_path / "out", "--arms", arm)
    assert code == 1 and "looked at" in err

"""What the command line takes, and what it says where it cannot go on. No model is loaded here."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ragkv
from ragkv import Progress
from ragkv.cli import main, show
from ragkv.cli.arguments import parser
from ragkv.cli.reading import ReadingBar, reading
from ragkv.errors import MethodError
from ragkv.methods import CacheBlend, FullPrefill, LegoLink, Reuse
from ragkv.methods.words import parse_method


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RAGKV_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["add"], "PATH"),
        (["ask"], "QUESTION"),
        (["ask", "  "], "the question is blank"),
        (["ask", "what?", "--top-k", "0"], "whole number of at least 1, got '0'"),
        (["ask", "what?", "--method", "magic"], "no method 'magic'; there are: "),
        (["ask", "what?", "--method", "lego-link:k=-1"], "k must be >= 0 tokens, got -1"),
        (["demo", "--questions", "x"], "got 'x'"),
        (["stats", "--model", "bundled"], "unrecognized arguments"),
        (["stats", "--js"], "unrecognized arguments"),
        (["add", "docs", "--path", ""], "argument --path: must be a folder, got ''; the working folder is ."),
    ],
)
def test_usage_errors_exit_with_2(argv, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert reason in err
    assert out == "" and "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "usage"),
    [
        (["fly"], "ragkv [-h]"),
        (["--fly"], "ragkv [-h]"),
        (["add"], "ragkv add"),
        (["ask", "what?", "--top-k", "0"], "ragkv ask"),
        (["ask", "what?", "and"], "ragkv ask"),
        (["add", "x", "--pinn"], "ragkv add"),
        (["stats", "--model", "bundled"], "ragkv stats"),
        (["eval", "--top-k", "3"], "ragkv eval"),
        (["prune"], "ragkv prune"),
        (["export", "x", "--all", "--kv-only"], "ragkv export"),
    ],
)
def test_usage_errors_show_the_usage_of_their_command(argv, usage, capsys):
    with pytest.raises(SystemExit):
        main(argv)
    err = capsys.readouterr().err
    assert err.startswith(f"usage: {usage} ") and err.count("usage: ") == 1
    assert err.splitlines()[-1].startswith(f"{usage.removesuffix(' [-h]')}: error: ")


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert (stopped.value.code, *capsys.readouterr()) == (0, f"ragkv {ragkv.__version__}\n", "")


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("reuse", Reuse()),
        ("full-prefill", FullPrefill()),
        ("lego-link", LegoLink()),
        ("lego-link:k=32", LegoLink(k=32)),
        ("cache-blend:ratio=0.2,signal=key", CacheBlend(ratio=0.2, signal="key")),
        ("cache-blend:gradual=0.3/0.2/0.1,check_layer=2", CacheBlend(gradual=(0.3, 0.2, 0.1), check_layer=2)),
        ("cache-blend:threshold=1.5", CacheBlend(threshold=1.5)),
    ],
)
def test_methods_as_words(text, method):
    assert parse_method(text) == method
    assert parser().parse_args(["ask", "what?", "--method", text]).method == method


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no method ''; there are: .*lego-link:k=.*reuse"),
        ("Reuse", "no method 'Reuse'"),
        ("reuse:k=1", "reuse has no setting 'k=1'; it is spelled reuse"),
        ("lego-link:16", "no setting '16'; it is spelled lego-link:k="),
        ("lego-link:k=many", "k must be of type int, got 'many'"),
        ("cache-blend:threshold=high", "threshold must be of type float, got 'high'"),
        ("cache-blend:ratio=2", r"ratio must lie in \[0, 1\]"),
    ],
)
def test_bad_methods(text, reason):
    with pytest.raises(MethodError, match=reason):
        parse_method(text)


@pytest.mark.parametrize("argv", [["ask", "what?"], ["stats"], ["stats", "--json"]])
def test_nothing_was_added_yet(argv, home, capsys):
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert (
        err
        == f"ragkv: no documents in {home}/default: add some with 'ragkv add PATH...', or name another folder with --path\n"
    )
    assert out == "" and not home.exists()


def test_an_unexpected_failure_is_one_line(monkeypatch, capsys):
    def broken(_):
        raise TypeError("two\nlines")

    monkeypatch.setattr("ragkv.cli.stats.run", broken)
    assert main(["stats"]) == 1
    assert capsys.readouterr().err == "ragkv: TypeError: two lines (--debug shows where)\n"
    with pytest.raises(TypeError):
        main(["stats", "--debug"])


def test_a_failure_tells_the_terminal_nothing(monkeypatch, capsys):
    def broken(_):
        raise ragkv.DocumentError("no document is called \x1b[31mred")

    monkeypatch.setattr("ragkv.cli.stats.run", broken)
    assert main(["stats"]) == 1
    assert capsys.readouterr().err == "ragkv: no document is called ?[31mred\n"


def test_interrupted(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ragkv.cli.stats.run", interrupted)
    assert main(["stats"]) == 130
    assert capsys.readouterr().err == "ragkv: interrupted\n"


def test_help_loads_no_model_library():
    """In a fresh interpreter, with ragkv's own namespace bare: only the command line's modules are looked at."""
    root = Path(ragkv.__file__).parent
    code = (
        "import sys, types; bare = types.ModuleType('ragkv'); bare.__path__ = [sys.argv[1]]\n"
        "bare.__version__ = '1'; sys.modules['ragkv'] = bare\n"
        "from ragkv.cli import main\n"
        "for argv in (['--help'], ['--version'], ['ask', '--help'], ['ask', '']):\n"
        "    try: main(argv)\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'faiss', 'lmdb', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, cwd="/")
    assert run.returncode == 0, run.stderr
    assert "demo" in run.stdout


def test_colours_only_on_a_terminal_that_wants_them(monkeypatch):
    assert show.paint("right", "green") == "right"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert show.paint("right", "green") == "\033[32mright\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert show.paint("right", "green") == "right"


def test_numbers_for_people(tmp_path, monkeypatch, capsys):
    assert [show.size(count) for count in (0, 1023, 1536, 3 << 20, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 MiB",
        "5120.0 GiB",
    ]
    assert [show.milliseconds(value) for value in (0.04, 12.34, 1234.5)] == ["0.0 ms", "12.3 ms", "1.23 s"]
    assert [show.number(count, "file") for count in (0, 1, 1200)] == ["0 files", "1 file", "1,200 files"]
    monkeypatch.chdir(tmp_path)
    odd = f"{tmp_path}/e\x1b[31mvil\n\udce9.md"
    assert show.short(odd) == "e?[31mvil??.md", "nothing that a terminal obeys, or that cannot be printed"
    assert [show.short(name) for name in (f"{tmp_path}/a/b.md", "/b.md", "name")] == ["a/b.md", "/b.md", "name"]
    show.table([("name", "size"), ("a long one", "5")])
    assert capsys.readouterr().out == "name        size\na long one     5\n"


def test_columns_stand_where_a_terminal_shows_wide_letters(capsys):
    show.table([("name", "size"), ("\ud55c\uae00.md", "5"), ("e\u0301te", "10"), ("\U0001f44d", "7")])
    assert capsys.readouterr().out.splitlines() == [
        "name     size",
        "\ud55c\uae00.md     5",  # two letters, two columns each
        "e\u0301te        10",  # four, one of which stands on another
        "\U0001f44d          7",
    ]


def test_what_is_read_again_is_named_up_to_a_number(capsys):
    shown = ReadingBar(lines=True, bar=False)
    for number in range(8):
        for done in (0, 5):
            shown(Progress(f"{number}.md", "missing", 10 * number + done, 80, 2048))
    shown.close()
    first, *again = capsys.readouterr().err.splitlines()
    assert first == "to read: 80 tokens, about 2.0 KiB of KV"
    assert again == [
        *(f"reading {number}.md again: its KV are not in the store" for number in range(5)),
        "... and others",
    ]


@pytest.mark.parametrize(
    ("options", "terminal", "shows"),
    [
        ([], True, "bar and lines"),
        (["--json"], True, "bar and lines"),
        ([], False, "lines"),
        (["--json"], False, ""),
        (["--progress"], False, "bar and lines"),
        (["--progress", "--json"], False, "bar and lines"),
        (["--no-progress"], True, ""),
        (["--no-progress", "--json"], True, ""),
        (["--no-progress"], False, ""),
    ],
)
@pytest.mark.parametrize("command", [["add", "x"], ["sync", "x"], ["refresh"], ["ask", "what?"]])
def test_when_progress_is_shown(command, options, terminal, shows, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    with reading(parser().parse_args([*command, *options])) as bar:
        bar(Progress("a.md", "new", 5, 10, 2048))
    err = capsys.readouterr().err
    assert ("to read: 10 tokens" in err, "reading:" in err) == ("lines" in shows, "bar" in shows)


def test_the_bar_counts_documents_then_tokens_with_rate_and_time_left(monkeypatch, capsys):
    times = iter(range(1000))
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(times)))
    shown = ReadingBar(lines=False, bar=True)
    for number in (1, 2, 3):
        shown(Progress(f"{number}.pdf", "found", 0, 100, done_documents=number, documents=4))
    drawn = capsys.readouterr().err.split("\r")
    assert any(
        re.search(r"looking:  75%.* 3/4 \[\d\d:\d\d<\d\d:\d\d, .*(documents/s|s/ documents), 3.pdf\]", line)
        for line in drawn
    )
    for done in (0, 50, 100):
        shown(Progress("1.pdf", "new", done, 100))
    shown.close()
    drawn = capsys.readouterr().err.split("\r")
    assert any(map(re.compile(r"reading: 100%.* 100/100 \[\d\d:\d\d<00:00, .* ?tokens").search, drawn))


def test_what_needs_no_model_loads_none(tmp_path):
    """A folder without documents is said to be one before anything is loaded that takes seconds."""
    lines = ["ask why", "chat", "docs", "forget a.md", "refresh", "stats", "ls", "prune --orphans", "verify"]
    code = (
        "import sys\nfrom ragkv.cli import main\n"
        "for line in sys.argv[2:]:\n"
        "    assert main([*line.split(), '--path', sys.argv[1]]) == 1, line\n"
        "    assert 'transformers' not in sys.modules, line\n"
    )
    argv = [sys.executable, "-P", "-c", code, str(tmp_path / "kv"), *lines]
    run = subprocess.run(argv, capture_output=True, text=True, cwd="/")
    assert run.returncode == 0 and run.stderr.count("ragkv add") == len(lines), run.stderr


def test_orders_are_those_of_a_retrieval():
    from ragkv.cli import searching
    from ragkv.retrieval import ranking

    assert searching.ORDERS == ranking.ORDERS

"""ask --report and stats --html: one file, nothing from elsewhere, everything escaped."""

import re
import sys
from html.parser import HTMLParser

import pytest

from ragkv import bundled
from ragkv.cli import main

QUESTION = "On which river does <script>alert(1)</script> & Clearport lie?"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Elements, their attributes, and the text; complains about tags that do not fit."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text


@pytest.fixture
def folder(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = tmp_path / "files"
    files.mkdir()
    (files / "clearport <b>&.md").write_text(bundled.documents()["clearport.md"])
    assert main(["add", str(files)]) == 0
    capsys.readouterr()
    return tmp_path


def page_of(path):
    page = Page(path.read_text("utf-8"))
    assert not {"script", "link", "img", "iframe", "object", "b"} & set(page.tags)
    assert not [value for name, value in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert not re.search(r"url\((?!#)|@import", path.read_text("utf-8"))
    assert ("lang", "en") in page.attributes and ("role", "img") in page.attributes
    assert "prefers-color-scheme: dark" in page.text and "currentColor" in path.read_text("utf-8")
    return page


def test_ask_writes_a_page(folder, capsys):
    ask = ["ask", QUESTION, "--top-k", "2", "--max-new-tokens", "4", "--report", "out.html"]
    assert main(ask) == 0
    out, err = capsys.readouterr()
    assert err.endswith("written to out.html\n")
    page = page_of(folder / "out.html")
    assert page.tags.count("svg") == 1 and page.text.count(QUESTION) == 2
    assert out.splitlines()[0].strip() in page.text
    assert page.text.count("files/clearport <b>&.md") >= 4, "in the table, and in the picture"
    assert "The prompt: " in page.text and "decode" in page.text and page.text.count("disk") >= 3

    before = (folder / "out.html").read_bytes()
    assert main(ask) == 1
    assert capsys.readouterr() == ("", "ragkv: out.html is there already: --force replaces it\n")
    assert (folder / "out.html").read_bytes() == before
    assert main([*ask, "--force", "--json"]) == 0
    assert (folder / "out.html").read_bytes() != before


def test_stats_write_a_page(folder, capsys):
    assert main(["ask", "Where does Clearport lie?", "--top-k", "2", "--max-new-tokens", "1"]) == 0
    assert main(["stats", "--html", "store.html"]) == 0
    page = page_of(folder / "store.html")
    assert page.tags.count("svg") == 1
    assert all(
        words in page.text for words in ("chunks read, by", "entries evicted", "entries on disk", "size on disk")
    )
    assert "read from disk" in page.text and "1 document, " in page.text
    capsys.readouterr()
    assert main(["stats", "--html", "store.html"]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["stats", "--html", "store.html", "--force"]) == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--report", "no/out.html"], "no/out.html cannot be written: it must name a file in a folder that is there"),
        (["--report", "."], ". cannot be written: it must name a file in a folder that is there"),
        (["--force"], "--force replaces a page, and no file for one was named"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_model_is_loaded(folder, capsys, monkeypatch, more, said):
    monkeypatch.setattr("ragkv.cli.ask.open_rag", None)
    assert main(["ask", "Where?", *more]) == 1
    assert capsys.readouterr() == ("", f"ragkv: {said}\n")


@pytest.mark.parametrize(("package", "extra"), [("jinja2", "report"), ("matplotlib", "plots")])
def test_without_what_pages_need(folder, capsys, monkeypatch, package, extra):
    monkeypatch.setattr("ragkv.cli.ask.open_rag", None)
    monkeypatch.setitem(sys.modules, package, None)
    for command in (["ask", "Where?", "--report", "out.html"], ["stats", "--html", "out.html"]):
        assert main(command) == 1
        assert f"pip install 'ragkv[{extra}]'" in capsys.readouterr().err
    assert not (folder / "out.html").exists()

"""What comes out of files that are no text, each through the process that converts."""

# ruff: noqa: RUF001 - letters of many scripts are meant

import json
import re
from datetime import datetime
from email.message import EmailMessage

import pytest

from ragkv.retrieval.converter import Converter
from ragkv.retrieval.loaders import load
from ragkv.retrieval.outline import Outline, joined, sections

from .files import docx, epub, pdf, pptx, xlsx

PAGE = """<!DOCTYPE html><html><head><title>The harbour</title><style>p { color: red }</style>
<script>var tracking = "who pays the harbour master";</script></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/about">About us</a></li></ul></nav>
<main><h2>Prices</h2><p>Tar costs <b>two</b> crowns a pot, says <a href="https://x.example/y?z=1">the list</a>.
<img src="data:image/png;base64,AAAA" alt="a pot"></p>
<table><tr><th>item</th><th>price_in_crowns</th></tr><tr><td>rope</td><td>3*2</td></tr></table></main>
<footer>All rights reserved</footer><script>more()</script></body></html>"""


@pytest.fixture(scope="module")
def converter():
    """One for all files: its process takes a second to start."""
    with Converter() as converter:
        yield converter


@pytest.fixture
def loaded(converter, tmp_path):
    def loaded(name, data):
        (tmp_path / name).write_bytes(data.encode() if isinstance(data, str) else data)
        return load(str(tmp_path / name), converter, None)

    return loaded


@pytest.fixture
def read(loaded):
    return lambda name, data: loaded(name, data).text


@pytest.mark.parametrize("body", ["main", "div"])
def test_html_is_its_text(read, body):
    text = read("a.html", PAGE.replace("main>", f"{body}>"))
    assert text.startswith("# The harbour\n\n## Prices\n\nTar costs **two** crowns a pot, says the list.\na pot")
    assert "| item | price_in_crowns |\n| --- | --- |\n| rope | 3*2 |" in text
    for noise in ("<", "tracking", "color", "About", "rights", "more()", "x.example", "base64"):
        assert noise not in text


def test_html_in_the_encoding_that_it_names(read):
    page = '<html><head><meta charset="windows-1251"></head><body><h1>Порт</h1>Да</body></html>'
    assert read("a.htm", page.encode("cp1251")) == "# Порт\n\nДа"


def test_deeply_nested_html(read):
    deep = 5000
    assert read("a.html", "<div>" * deep + "<p>inner</p>" + "</div>" * deep) == "inner"


def test_docx(read):
    text = read("a.docx", docx((1, "Harbours"), "Clearport is old.", (2, "Trade"), "They sell tar_pots."))
    assert text == "# Harbours\n\nClearport is old.\n\n## Trade\n\nThey sell tar_pots."


def test_pptx_by_slides(loaded):
    file = loaded("a.pptx", pptx(("Harbours", "Clearport is old."), ("Trade", "They sell tar.")))
    first, second = file.outline.pages
    assert file.text[first:second].strip() == "# Harbours\nClearport is old."
    assert file.text[second:].strip() == "# Trade\nThey sell tar."
    assert [title for _, title in file.outline.sections] == ["Harbours", "Trade"]


def test_xlsx_as_it_is_shown(read):
    rows = [["name", "age", "since"], ["Anna|A", 31, datetime(2020, 1, 2)], [], ["Bob", None, 1.5]]
    text = read("a.xlsx", xlsx({"Staff": rows, "Empty": [], "Prices": [["tar", 2]]}))
    assert text == (
        "## Staff\n\n| name | age | since |\n| --- | --- | --- |\n| Anna\\|A | 31 | 2020-01-02 |\n| Bob |  | 1.5 |\n\n"
        "## Prices\n\n| tar | 2 |\n| --- | --- |"
    )


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_is_a_table(read, delimiter):
    rows = ["name city", 'Anna "Lower  Port"', "Bob Wye"]
    data = "\r\n".join(row.replace(" ", delimiter, 1) for row in rows)
    assert read("a.csv", data) == "| name | city |\n| --- | --- |\n| Anna | Lower Port |\n| Bob | Wye |"


def test_csv_of_one_column(read):
    assert read("a.csv", "name\nAnna\nBob") == "| name |\n| --- |\n| Anna |\n| Bob |"


def test_json_in_lines(read):
    assert read("a.json", json.dumps({"city": "Köln", "n": [1, 2]})) == (
        '{\n "city": "Köln",\n "n": [\n  1,\n  2\n ]\n}'
    )
    assert read("b.json", "// no JSON\n{}") == "// no JSON\n{}"
    assert read("c.json", "[" * 100_000) == "[" * 100_000


def test_epub(read):
    text = read("a.epub", epub("<h1>One</h1><p>First.</p><script>x()</script>", "<h1>Two</h1><p>Second.</p>"))
    assert text.startswith("**Title:** The book\n\n# One\n\nFirst.\n\n# Two\n\nSecond.")


def test_a_notebook(read):
    cells = [{"cell_type": "markdown", "source": ["# Tides\n", "é"]}, {"cell_type": "code", "source": ["x = 1"]}]
    text = read("a.ipynb", json.dumps({"cells": cells, "nbformat": 4, "nbformat_minor": 5}))
    assert text == "# Tides\né\n\n```python\nx = 1\n```"


def test_a_feed(read):
    feed = (
        '<rss version="2.0"><channel><title>News</title><item><title>Tar</title>'
        "<description>&lt;p&gt;Tar is &lt;b&gt;sold&lt;/b&gt;.&lt;/p&gt;</description></item></channel></rss>"
    )
    text = read("a.rss", feed)
    assert "# News" in text and "## Tar" in text and "Tar is **sold**." in text


@pytest.mark.parametrize("kind", ["plain", "html"])
def test_mail(read, kind):
    message = EmailMessage()
    message["Subject"], message["From"], message["To"] = "Tär", "Anna <anna@x.example>", "bob@x.example"
    message.set_content("Two crowns, naïvely.") if kind == "plain" else message.set_content(
        "<p>Two crowns, <b>naïvely</b>.</p><style>x</style>", subtype="html", charset="latin-1"
    )
    message.add_attachment(b"\0\1", maintype="application", subtype="octet-stream", filename="a.bin")
    text = read("a.eml", bytes(message))
    body = "Two crowns, naïvely." if kind == "plain" else "Two crowns, **naïvely**."
    assert text.strip() == f"# Tär\n\nFrom: Anna <anna@x.example>\nTo: bob@x.example\n\n{body}"


def test_a_pdf_by_pages(loaded):
    file = loaded("a.pdf", pdf("First words", "", "Third words"))
    at = [file.text.index(word) for word in ("First", "Third")]
    assert [file.outline.page(position) for position in at] == [1, 3]
    assert file.outline.sections == ()


@pytest.mark.parametrize("name", ["a.docx", "a.pptx", "a.xlsx", "a.epub", "a.pdf", "a.msg", "a.rss", "a.ipynb"])
@pytest.mark.parametrize("damage", ["noise", "cut"])
def test_a_damaged_file_is_named(loaded, name, damage):
    whole = {"a.docx": docx("text"), "a.xlsx": xlsx({"s": [["x"]]}), "a.epub": epub("x"), "a.pptx": pptx(("a", "b"))}
    data = whole.get(name, b"{broken <x>")
    data = data[: len(data) // 2] if damage == "cut" else b"noise, not a file"
    reason = loaded(name, data).reason
    assert reason.startswith("damaged or cut short, or no ") and not re.search(r"Error\b", reason)


@pytest.mark.parametrize("name", ["a.docx", "a.xlsx", "a.pptx"])
def test_an_encrypted_office_file_is_named(loaded, name):
    """They are no zip any more but what Office wrote before 2007."""
    reason = loaded(name, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(1000)).reason
    assert reason.startswith("encrypted, or of an old format")


def test_sections():
    text = "intro\n# A #\n\n## B\ntext\n```\n# no\n```\n### C ##\nx\n## D\ny\n# E\n# F\nq"
    found = [(text[start:].splitlines()[0], path) for start, path in sections(text)]
    assert found == [("# A #", "A > B"), ("### C ##", "A > B > C"), ("## D", "A > D"), ("# E", "E"), ("# F", "F")]


def test_a_page_begins_at_its_first_character():
    text, starts = joined(["one", "two"])
    assert [Outline(starts).page(at) for at in (0, text.index("two") - 1, text.index("two"), len(text))] == [1, 1, 2, 2]

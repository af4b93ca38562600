"""Files that hang the converter, explode in it or break it: named and skipped, and the rest goes on."""

import io
import os
import struct
import zipfile
from pathlib import Path

import pytest

from ragkv.retrieval import LoadedFile, SkippedFile, load_files
from ragkv.retrieval import converter as module
from ragkv.retrieval.converter import Converter
from ragkv.retrieval.loaders import load

from .files import PARSER, docx, epub, laughs, xlsx, zipped


@pytest.fixture
def parser(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("parser")
    (folder / "pypdf.py").write_text(PARSER)
    monkeypatch.syspath_prepend(folder)


def write(folder, **files):
    for name, data in files.items():
        (folder / name.replace("_", ".")).write_bytes(data.encode() if isinstance(data, str) else data)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("hang", "not converted within 2 s"),
        ("swell", "not converted within 1024 MiB of memory"),
        ("die", "the converter broke down at it (exit code -6)"),
    ],
)
def test_a_file_that_breaks_a_limit_is_skipped(tmp_path, parser, monkeypatch, bad, reason):
    monkeypatch.setattr(module, "TIME_LIMIT_S", 2)
    monkeypatch.setattr(module, "MEMORY_LIMIT_BYTES", 1 << 30)
    write(tmp_path, a_pdf="fine", b_pdf=bad, c_pdf="fine", d_txt="fine", e_pdf="print")
    first, skipped, second, text, third = load_files(tmp_path)
    assert skipped.reason == reason
    assert [file.text.split()[0] for file in (first, second, text, third)] == ["fine", "fine", "fine", "print"]
    assert first.text != second.text, "another process"
    assert second.text.split()[1] == third.text.split()[1], "one for all that go well"


def test_the_process_ends_with_the_files(tmp_path, parser):
    write(tmp_path, a_pdf="fine", b_pdf="fine")
    files = load_files(tmp_path)
    process = int(next(files).text.split()[1])
    os.kill(process, 0)
    files.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_text_needs_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_started", lambda: pytest.fail("a process was started"))
    write(tmp_path, a_txt="text", b_md="# text", c_py="x = 1")
    assert all(isinstance(file, LoadedFile) for file in load_files(tmp_path))


def test_ctrl_c_while_a_file_is_converted(interruptible, tmp_path, parser):
    write(tmp_path, a_pdf="ctrl-c", b_pdf="fine")
    with Converter() as converter:
        with pytest.raises(KeyboardInterrupt):
            load(str(tmp_path / "a.pdf"), converter, None)
        assert load(str(tmp_path / "b.pdf"), converter, None).text.startswith("fine")


@pytest.mark.parametrize("name", ["a.docx", "a.xlsx", "a.pptx", "a.epub"])
def test_a_zip_bomb_is_not_unpacked(tmp_path, monkeypatch, name):
    monkeypatch.setattr(module, "UNPACKED_LIMIT_BYTES", 1 << 20)
    (tmp_path / name).write_bytes(zipped({"word/document.xml": bytes(2 << 20), "other": bytes(2 << 20)}))
    (tmp_path / "b.txt").write_text("fine")
    skipped, text = load_files(tmp_path)
    assert skipped.reason == f"too large: unpacked it has {4 << 20} bytes, at most {1 << 20}" and text.text == "fine"


def test_an_archive_that_lies_about_its_size_is_not_unpacked(tmp_path, monkeypatch):
    """It declares 100 bytes and has 64 MiB."""
    monkeypatch.setattr(module, "UNPACKED_LIMIT_BYTES", 1 << 20)
    body = bytes(64 << 20)
    whole = zipped({"word/document.xml": body})
    lie = whole.replace(struct.pack("<I", len(body)), struct.pack("<I", 100))
    assert lie != whole
    (tmp_path / "a.docx").write_bytes(lie)
    (skipped,) = load_files(tmp_path)
    assert skipped.reason.startswith("damaged or cut short, or no DOCX at all: ")


def _exploding():
    part = "xl/worksheets/sheet1.xml"
    with zipfile.ZipFile(io.BytesIO(xlsx({"s": [["x"]]}))) as archive:
        book = {name: archive.read(name) for name in archive.namelist()}
    cell = '<sheetData><row r="1"><c r="A1" t="inlineStr"><is><t>&lol9;</t></is></c></row></sheetData>'
    namespace = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    book[part] = f'{laughs("worksheet")}<worksheet xmlns="{namespace}">{cell}</worksheet>'
    chapter = f"{laughs('html')}<html><body>&lol9;</body></html>"
    return {
        "a.xlsx": zipped(book),
        "a.docx": docx("&lol9;", doctype=laughs("w:document")),
        "a.epub": zipped({"META-INF/container.xml": laughs("container") + "<container>&lol9;</container>"}),
        "b.epub": epub(chapter),
        "a.rss": f"{laughs('rss')}<rss><channel><title>&lol9;</title></channel></rss>".encode(),
        "a.html": chapter.encode(),
    }


def test_entities_do_not_explode(tmp_path):
    for name, data in _exploding().items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "z.txt").write_text("fine")
    *files, text = load_files(tmp_path)
    assert len(files) == len(_exploding()) and text.text == "fine"
    assert all("lollol" not in getattr(file, "text", "").partition("<html>")[2] for file in files)
    assert sum(isinstance(file, SkippedFile) for file in files) >= 3


def test_no_process_can_be_started(tmp_path, monkeypatch):
    monkeypatch.setattr(module.sys, "executable", str(tmp_path / "no python"))
    (tmp_path / "a.json").write_text("{}")
    (skipped,) = load_files(tmp_path)
    assert "no process for converting files can be started" in skipped.reason


def test_what_another_version_has_converted_is_converted_again(tmp_path, monkeypatch):
    """Also where only the encoding that is asked for is another."""
    asked, versions = [], {"ragkv": "1"}
    monkeypatch.setattr(Converter, "_asked", lambda self, kind, data: asked.append(data) or {"pages": [kind]})
    monkeypatch.setattr("ragkv.retrieval.converter._version", lambda package: versions.get(package, ""))
    with Converter(tmp_path) as converter:
        for version, encoding in (("1", None), ("1", None), ("2", None), ("2", "cp1252"), ("1", None)):
            versions["ragkv"] = version
            assert converter.convert(Path("a.csv"), b"a,b", encoding).pages == ["csv"]
    assert len(asked) == 3

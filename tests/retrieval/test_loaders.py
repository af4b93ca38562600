import bz2
import gzip
import io
import lzma
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from ragkv.errors import DocumentError, MissingPackageError
from ragkv.retrieval import LoadedFile, SkippedFile, load_files, read_file
from ragkv.retrieval.loaders import hidden_files

from .files import pdf, zipped

EXTRAS = ("pdf", "files", "files", "files")


def by_name(found):
    return {Path(file.source).name: file for file in found}


def test_hidden_files_are_counted(tmp_path):
    for name in (".env", "a.md", ".git/config", ".git/.deep", "sub/.swp", "sub/b.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / ".git")  # is not followed
    assert hidden_files(tmp_path) == 3, ".env, .git as one, .swp"
    assert hidden_files([tmp_path, tmp_path / "sub", tmp_path / ".env"]) == 2, "what is named itself is read"
    assert hidden_files(tmp_path / ".git") == 1 and hidden_files(tmp_path / "a.md") == 0
    assert hidden_files(tmp_path / "nothing") == hidden_files([]) == 0
    assert len(list(load_files([tmp_path, tmp_path / ".env"]))) == 3


def test_a_folder_of_everything(tmp_path):
    (tmp_path / "sub" / ".hidden").mkdir(parents=True)
    files = {
        "a.txt": b"Plain.\r\nTwo lines.\rThree.",
        "b.md": "\ufeff# Head\n\nText with é.".encode(),
        "c.pdf": pdf("Words in a page"),
        "d.pdf": pdf("Nobody may print", password=""),
        "e.pdf": pdf("Secret", password="x"),
        "f.pdf": b"%PDF-1.4 broken",
        "g.pdf": pdf(""),
        "h.txt": "sixteen \N{SNOWMAN}".encode("utf-16"),
        "i.txt": "thirty-two".encode("utf-32"),
        "j.bin": b"\x00\x01\x02",
        "k.txt": "Ein Café in Köln".encode("latin-1"),
        "l.txt": b" \n ",
        "m.txt": b"x" * 5000,
        "sub/n.md": b"inner",
        "sub/.o.txt": b"hidden",
        "sub/.hidden/p.txt": b"hidden",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = list(load_files(tmp_path, max_bytes=4096))
    sources = [file.source for file in found]
    assert sources == sorted(sources) and all(os.path.isabs(source) for source in sources)
    named = by_name(found)
    assert {name: file.text.strip() for name, file in named.items() if isinstance(file, LoadedFile)} == {
        "a.txt": "Plain.\nTwo lines.\nThree.",
        "b.md": "# Head\n\nText with é.",
        "c.pdf": "Words in a page",
        "d.pdf": "Nobody may print",
        "h.txt": "sixteen ☃",
        "i.txt": "thirty-two",
        "k.txt": "Ein Café in Köln",
        "n.md": "inner",
    }
    reasons = {name: file.reason for name, file in named.items() if isinstance(file, SkippedFile)}
    assert reasons.keys() == {"e.pdf", "f.pdf", "g.pdf", "j.bin", "l.txt", "m.txt", "pipe", "gone.txt"}
    for name, reason in {
        "e.pdf": "encrypted",
        "f.pdf": "damaged or cut short, or no PDF at all: see whether another program opens it",
        "g.pdf": "no text in it",
        "j.bin": "binary",
        "l.txt": "empty",
        "m.txt": "too large: 5000 bytes, at most 4096",
        "pipe": "not a regular file",
        "gone.txt": "cannot be read",
    }.items():
        assert reason in reasons[name] and "\n" not in reasons[name]


OLD_OFFICE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600)


def tarred():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        *((name, OLD_OFFICE, "save a copy as .docx") for name in ("a.doc", "a.xls", "a.ppt")),
        ("a.rtf", rb"{\rtf1\ansi Text}", "save a copy as .docx"),
        (
            "a.odt",
            zipped({"mimetype": b"application/vnd.oasis.opendocument.text"}, zipfile.ZIP_STORED),
            "a copy as .docx",
        ),
        ("a.docm", zipped({"[Content_Types].xml": b"<Types/>"}), "save a copy as .docx"),
        ("a.zip", zipped({"a.txt": b"text"}), "an archive: unpack it"),
        ("a.tar", tarred(), "an archive: unpack it"),
        ("a.tar.gz", gzip.compress(tarred()), "an archive: unpack it"),
        ("a.tar.bz2", bz2.compress(tarred()), "an archive: unpack it"),
        ("a.tar.xz", lzma.compress(tarred()), "an archive: unpack it"),
        ("none.pdf", b"", "empty"),
    ],
)
def test_what_no_converter_reads_is_named_with_what_to_do(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    (skipped,) = load_files(tmp_path)
    assert reason in skipped.reason


def test_paths_are_read_in_order_and_once(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", ".hidden.txt"):
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    found = [Path(file.source).name for file in load_files(["b.txt", ".", "./a.txt", tmp_path / ".hidden.txt"])]
    assert found == ["b.txt", "a.txt", ".hidden.txt"]


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("text")
    (tmp_path / "docs" / ".hidden").write_text("text")
    assert [file.source for file in load_files("~/docs")] == [str(tmp_path / "docs" / "a.md")]
    assert hidden_files(Path("~/docs")) == 1


def test_missing_and_unreadable_are_skipped(tmp_path, monkeypatch):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_text("bad")
    (tmp_path / "folder").mkdir()
    read_bytes, listdir = Path.read_bytes, os.listdir

    def refused(path):
        if path.name == "bad.txt":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    def unlisted(path):
        if path.endswith("folder"):
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    monkeypatch.setattr(os, "listdir", unlisted)
    named = by_name(load_files([tmp_path / "nowhere", tmp_path]))
    assert named["good.txt"].text == "good"
    assert named["nowhere"].reason == "cannot be read: No such file or directory"
    assert named["bad.txt"].reason == "cannot be read: Permission denied"
    assert named["folder"].reason == "the folder cannot be listed: Permission denied"


def test_without_its_extra_a_file_is_skipped_and_the_command_named(tmp_path, monkeypatch):
    for name in ("a.pdf", "b.docx", "c.html", "d.xlsx"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "e.txt").write_text("text")
    for package in ("pypdf", "mammoth", "markdownify", "openpyxl"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=r"pip install 'ragkv\[pdf\]'"):
        read_file(tmp_path / "a.pdf")
    *skipped, loaded = load_files(tmp_path)
    assert all(f"pip install 'ragkv[{extra}]'" in item.reason for extra, item in zip(EXTRAS, skipped, strict=True))
    assert loaded.text == "text"


def test_read_file_says_why(tmp_path):
    with pytest.raises(DocumentError, match="No such file"):
        read_file(tmp_path / "nowhere.txt")
    with pytest.raises(DocumentError, match="not a regular file"):
        read_file(tmp_path)


def test_a_file_has_one_name_however_it_is_reached(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "0a1b").write_bytes(pdf("Words in a page"))
    (tmp_path / "named.pdf").symlink_to("store/0a1b")
    found = list(load_files([tmp_path / "named.pdf"]))
    assert [(file.source, file.text) for file in found] == [(str(tmp_path / "store" / "0a1b"), "Words in a page")], (
        "read by the name that was given"
    )


def test_pypdf_is_quiet(tmp_path):
    """In a process without any logging set up, where Python shows warnings of itself."""
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4\nbroken\nstartxref\n9\n%%EOF")
    code = (
        "import sys; from ragkv.retrieval import load_files; print([file.reason for file in load_files(sys.argv[1])])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "no PDF at all" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("paths", [None, 3, [None], [""], "", [b"a"]])
def test_what_is_no_path_is_refused(paths):
    with pytest.raises(DocumentError, match="paths must be paths"):
        list(load_files(paths))

"""Text files in the encodings that there are: found out, or named."""

# ruff: noqa: RUF001 - letters and quotes of many scripts are meant

import codecs
import sys

import pytest

from ragkv.errors import ArgumentError, ArgumentTypeError, DocumentError
from ragkv.retrieval import LoadedFile, SkippedFile, load_files, read_file
from ragkv.retrieval.encodings import decoded

GERMAN = "Die Straße führt über die Brücke nach Köln. Äpfel, Öl und Übermut kosten 5 Taler pro Stück."
FRENCH = "Le café est fermé à cause de la fête de l'été. Où êtes-vous allés déjà ?"
ENGLISH = "It’s a “quoted” text – with dashes, and it costs £5."
POLISH = (
    "Łódź jest w środkowej Polsce, a rzeka płynie przez miasto. Wszyscy ludzie rodzą się wolni i równi pod względem swej "
    "godności i swych praw. Są oni obdarzeni rozumem i sumieniem i powinni postępować wobec innych w duchu braterstwa."
)
RUSSIAN = "Река течёт в море. Где находится порт? Москва большая."
JAPANESE = "川は海に流れている。クリアポートはどの川にありますか。東京の天気は晴れです。"
CHINESE = "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。"

DETECTED = [
    *[(GERMAN, name) for name in ("utf-8", "latin-1", "cp1252", "utf-16", "utf-16-le", "utf-16-be", "utf-8-sig")],
    *[(FRENCH, name) for name in ("latin-1", "cp1252", "utf-16")],
    (ENGLISH, "cp1252"),
    *[(POLISH, name) for name in ("cp1250", "iso8859-2")],
    *[(RUSSIAN, name) for name in ("cp1251", "koi8-r", "utf-16-le")],
    *[(JAPANESE, name) for name in ("shift_jis", "euc_jp", "utf-16-le", "utf-32")],
    *[(CHINESE, name) for name in ("gb18030", "utf-16-be")],
    *[(text, "latin-1") for text in ("é", "café", "Straße", "Müller, Köln", "name;city\nMüller;Köln\nJosé;Málaga\n")],
]


@pytest.mark.parametrize(("text", "encoding"), DETECTED, ids=lambda value: value[:8])
def test_an_encoding_is_found_out(text, encoding):
    assert decoded(text.encode(encoding)).removeprefix("\ufeff") == text


@pytest.mark.parametrize("encoding", ["latin-1", "mac-roman", "cp850", "cp037", "utf-16-le", "utf-8"])
def test_an_encoding_can_be_named(tmp_path, encoding):
    (tmp_path / "old.txt").write_bytes(GERMAN.encode(encoding))
    (tmp_path / "old.csv").write_bytes(f"name,city\nMüller,Köln\n{GERMAN},x".encode(encoding))
    (tmp_path / "old.html").write_bytes(f"<meta charset=utf-8><p>{GERMAN}</p>".encode(encoding))
    (tmp_path / "old.json").write_bytes(f'"{GERMAN}"'.encode(encoding))
    files = list(load_files(tmp_path, encoding=encoding))
    table, *others = files
    assert "| Müller | Köln |" in table.text
    assert len(others) == 3 and all(isinstance(file, LoadedFile) and GERMAN in file.text for file in others)


def test_a_byte_order_mark_counts_before_a_name():
    assert decoded(codecs.BOM_UTF8 + "é".encode(), "latin-1") == "é"


def test_a_named_encoding_that_does_not_fit_is_not_overridden(tmp_path):
    (tmp_path / "a.txt").write_bytes(GERMAN.encode("latin-1"))
    (file,) = load_files(tmp_path, encoding="utf-8")
    assert file == SkippedFile(str(tmp_path / "a.txt"), "not utf-8: byte 8 (invalid continuation byte)")


@pytest.mark.parametrize("name", ["no such", "", "base64", "a\0b", "rot13"])
def test_an_unknown_encoding_is_refused_before_anything_is_read(tmp_path, name):
    (tmp_path / "a.txt").write_text("text")
    for read in (
        lambda: list(load_files(tmp_path, encoding=name)),
        lambda: read_file(tmp_path / "a.txt", encoding=name),
    ):
        with pytest.raises(ArgumentError, match=r"encoding must be one that Python knows, got .* cp1252, .* shift_jis"):
            read()
    with pytest.raises(ArgumentTypeError, match="encoding must be the name"):
        list(load_files(tmp_path, encoding=8))


def test_without_charset_normalizer_it_is_said_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "charset_normalizer", None)
    with pytest.raises(DocumentError, match=r"not UTF-8: name its encoding .* pip install 'ragkv\[files\]'"):
        decoded(GERMAN.encode("latin-1"))
    with pytest.raises(DocumentError, match=r"^binary$"):
        decoded(b"\x89PNG\0\xff")


@pytest.mark.parametrize(
    "data",
    [
        b"\0\1\2",
        b"\0\xff",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 4,
        b"PK\3\4" + bytes(range(255, -1, -1)) * 8,
        b"text and\0zero",
        b"A long text of plain words with one \0 zero among them, and more words behind it.\n" * 5,
    ],
    ids=["three", "two", "png", "zip", "zero", "a zero in a long text"],
)
def test_binary(data):
    with pytest.raises(DocumentError, match=r"^binary"):
        decoded(data)

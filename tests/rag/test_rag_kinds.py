"""Files of many kinds as documents: found by what they say, and each passage knows its page and its headings."""

import pytest

from ragkv import ArgumentError
from ragkv.exchange import export_folder, import_folder
from ragkv.retrieval import TokenChunker
from ragkv.retrieval.converter import Converter
from tests.retrieval.files import docx, pdf, pptx, xlsx

from .rags import TOKENIZER, open_rag

CASTLE = "The castle of Thornfield has seven towers and a bridge, and nobody has lived there for years."
MILL = "The mill at Wye grinds barley for the whole valley, and its wheel turns by day and by night."
FILES = {
    "a.pdf": (pdf(CASTLE, "", MILL), {CASTLE: (1, ""), MILL: (3, "")}),
    "b.pptx": (pptx(("Castles", CASTLE), ("Mills", MILL)), {CASTLE: (1, "Castles"), MILL: (2, "Mills")}),
    "c.docx": (
        docx((1, "Places"), (2, "Castles"), CASTLE, (2, "Mills"), MILL),
        {CASTLE: (None, "Places > Castles"), MILL: (None, "Places > Mills")},
    ),
    "d.xlsx": (xlsx({"Castles": [[CASTLE]], "Mills": [[MILL]]}), {CASTLE: (None, "Castles"), MILL: (None, "Mills")}),
    "e.html": (
        f"<h1>Places</h1><h2>Castles</h2><p>{CASTLE}</p><h2>Mills</h2><p>{MILL}</p>".encode(),
        {CASTLE: (None, "Places > Castles"), MILL: (None, "Places > Mills")},
    ),
    "f.md": (
        f"# Places\n\n## Castles\n\n{CASTLE}\n\n## Mills\n\n{MILL}".encode(),
        {CASTLE: (None, "Places > Castles"), MILL: (None, "Places > Mills")},
    ),
    "g.txt": (f"# no heading\n\n{CASTLE}\n\n# none\n\n{MILL}".encode(), {CASTLE: (None, ""), MILL: (None, "")}),
}


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    for name, (data, _) in FILES.items():
        (folder / name).write_bytes(data)
    return folder


def places(rag, name):
    """Page and heading of the two passages of a file, by what they say."""
    hits = [hit for hit in rag.retriever.search("castle mill", 50) if hit.source.endswith(name)]
    return {text: (hit.page, hit.heading) for text in (CASTLE, MILL) for hit in hits if text in hit.text}


def test_pages_and_headings_stay_with_passages(model, docs, tmp_path):
    want = {name: where for name, (_, where) in FILES.items()}
    with open_rag(tmp_path / "rag", model) as rag:
        added = rag.add_files(docs)
        assert added.skipped == [] and len(added.changes) == len(FILES)
        assert {name: places(rag, name) for name in FILES} == want
        assert {(hit.page, hit.heading) for hit in rag.ask(MILL, top_k=20, max_new_tokens=1).sources} >= {
            (3, ""),
            (2, "Mills"),
        }
        rag.add_texts([f"# Text\n\n{MILL}"], ["given"])
        assert places(rag, "given") == {MILL: (None, "Text")}
        again = rag.add_files(docs)
        assert again.tokens_read == 0 and not any(change.new or change.removed for change in again.changes)
    export_folder(tmp_path / "rag", tmp_path / "all.tar")
    import_folder(tmp_path / "other", tmp_path / "all.tar", disk_bytes=1 << 30)
    moved = docs.rename(tmp_path / "papers")
    for folder in ("rag", "other"):
        with open_rag(tmp_path / folder, model) as rag:
            assert {name: places(rag, name) for name in FILES} == want
            assert len(rag.sync(moved).moved) == len(FILES)
            assert {name: places(rag, name) for name in FILES} == want
            assert rag.retriever.catalogue.check() == []


def test_a_folder_made_before_learns_pages_without_reading(model, docs, tmp_path, reads):
    """Its records have none; the same files added again have them, and nothing is read."""
    with open_rag(tmp_path / "rag", model) as rag:
        rag.add_files(docs / "a.pdf")
        listed = rag.retriever.catalogue.documents()[0]
        passages = rag.retriever.catalogue.texts(listed.source)
        reading = rag.retrieve(MILL)[0].reading
        rag.retriever.add(listed.source, passages, spans=listed.spans, origin=listed.origin, reading=reading)
        assert places(rag, "a.pdf") == {CASTLE: (None, ""), MILL: (None, "")}
        seen = reads(rag.engine)
        added = rag.add_files(docs / "a.pdf")
        assert added.tokens_read == 0 and seen == [] and not added.changes[0].new
        assert places(rag, "a.pdf") == {CASTLE: (1, ""), MILL: (3, "")}


def test_the_right_page_is_found(model, tmp_path):
    """Every page's scripts and menus are full of what is asked; one page says it."""
    noise = "castle of Thornfield seven towers bridge"
    body = {"right": CASTLE, "wrong": MILL, "other": "Ferries cross the bay at noon and come back at dusk."}
    for name, text in body.items():
        page = (
            f"<html><head><script>const menu = '{noise} {noise}';</script><style>.castle {{ towers: 7 }}</style></head><body>"
            f"<nav>{' '.join([noise] * 3) if name != 'right' else 'Home'}</nav><p>{text}</p></body></html>"
        )
        (tmp_path / f"{name}.html").write_text(page)
    with open_rag(model=model) as rag:
        rag.add_files(tmp_path)
        best = rag.retriever.search("How many towers has the castle of Thornfield?", 3)
        assert best[0].source.endswith("right.html") and best[0].score > 2 * best[1].score
        assert best[0].text == CASTLE


def test_another_encoding_is_named_once_more_without_reading(model, tmp_path):
    path = tmp_path / "old.txt"
    path.write_bytes("Die Straße nach Köln ist gesperrt.".encode("cp850"))
    with open_rag(tmp_path / "rag", model) as rag:
        assert rag.add_files(path, encoding="cp850").tokens_read > 0
        assert rag.retrieve("Straße")[0].text == "Die Straße nach Köln ist gesperrt."
        assert rag.add_files(path, encoding="cp850").tokens_read == 0
        assert rag.sync(tmp_path / "rag" / "..", encoding="cp850").unchanged == [str(path)]
        for call in (rag.add_files, rag.sync):
            with pytest.raises(
                ArgumentError, match="encoding must be one that Python knows, got 'klingon'; it knows ascii"
            ):
                call(tmp_path, encoding="klingon")


def test_one_bad_file_among_many(model, docs, tmp_path):
    (docs / "bad.docx").write_bytes(docx("text")[:200])
    (docs / "bad.pdf").write_bytes(pdf("Secret", password="x"))
    with open_rag(tmp_path / "rag", model) as rag:
        added = rag.add_files(docs)
        assert len(added.changes) == len(FILES)
        assert {item.source.rpartition("/")[2]: item.reason.partition(":")[0] for item in added.skipped} == {
            "bad.docx": "damaged or cut short, or no DOCX at all",
            "bad.pdf": "encrypted",
        }


def test_an_unchanged_file_is_not_converted_again(model, docs, tmp_path, monkeypatch):
    asked, ask = [], Converter._asked
    monkeypatch.setattr(Converter, "_asked", lambda self, kind, data: asked.append(kind) or ask(self, kind, data))
    kinds = ["pdf", "pptx", "docx", "xlsx", "html"]
    with open_rag(tmp_path / "rag", model) as rag:
        before = rag.add_files(docs)
        assert asked == kinds
    want = {name: where for name, (_, where) in FILES.items()}
    with open_rag(tmp_path / "rag", model) as rag:
        asked.clear()
        again = rag.add_files(docs)
        assert asked == [] and again.tokens_read == 0 and again.kv_bytes["disk"] == before.kv_bytes["disk"]
        assert [change.document for change in again.changes] == [change.document for change in before.changes]
        assert len(rag.sync(docs, dry_run=True).unchanged) == len(rag.sync(docs).unchanged) == len(FILES)
        assert asked == [] and {name: places(rag, name) for name in FILES} == want

        (docs / "a.pdf").write_bytes(pdf(MILL, CASTLE))
        assert [change.replaced for change in rag.add_files(docs).changes] == [True] * len(FILES)
        assert asked == ["pdf"] and places(rag, "a.pdf") == {MILL: (1, ""), CASTLE: (2, "")}
        rag.sync(docs, encoding="ascii")
        assert sorted(asked[1:]) == sorted(kinds), "what was asked for is another thing"
        asked.clear()
        monkeypatch.setattr("ragkv.retrieval.converter._version", lambda package: "of tomorrow")
        rag.add_files(docs)
        rag.add_files(docs)
        assert asked == kinds
        rag.chunker = TokenChunker(TOKENIZER, 12)
        assert rag.add_files(docs / "a.pdf").changes[0].new


def test_what_was_converted_before_ctrl_c_is_kept(model, docs, tmp_path, monkeypatch):
    """The same call goes on from there; what was there before stays, and nothing is left behind at last."""
    asked, ask = [], Converter._asked
    monkeypatch.setattr(Converter, "_asked", lambda self, kind, data: asked.append(kind) or ask(self, kind, data))

    def stop(step):
        if step.source.endswith("c.docx"):
            raise KeyboardInterrupt

    with open_rag(tmp_path / "rag", model) as rag:
        rag.add_texts([MILL], ["there before"])
        with pytest.raises(KeyboardInterrupt):
            rag.add_files(docs, progress=stop)
        assert asked == ["pdf", "pptx", "docx"] and [document.source for document in rag.documents()] == [
            "there before"
        ]
        damaged, *_ = (tmp_path / "rag").rglob(".converted/*")
        damaged.write_bytes(b"")
    with open_rag(tmp_path / "rag", model) as rag:
        asked.clear()
        assert len(rag.add_files(docs).changes) == len(FILES)
        assert len(asked) == 3 and asked[1:] == ["xlsx", "html"], "the damaged one, and those not yet converted"
        assert {name: places(rag, name) for name in FILES} == {name: where for name, (_, where) in FILES.items()}
        assert not list((tmp_path / "rag").rglob(".converted"))
        assert rag.sync(docs, dry_run=True).tokens == 0 and rag.sync(docs).tokens == 0
        assert not list((tmp_path / "rag").rglob(".converted"))

"""Pictures of answers: each chunk where it stands, by where its KV came from, and the tokens that were recomputed."""

import json
import sys
import warnings

import pytest
import torch
from matplotlib.colors import to_hex

from ragkv import FullPrefill, LegoLink, MissingPackageError, Retrieval, Reuse
from ragkv.pictures import svg
from ragkv.report import AnswerReport, ChunkReport, FusionReport

from .rags import QUESTION, open_rag

NAMES = {
    "#2e70c4": "cpu",
    "#b6571b": "computed",
    "#8a6d10": "unused",
    "#666c76": "prompt",
    "#8b919b": "fresh",
    "#7c5fcb": "disk",
}
SHORT = {"top_k": 3, "max_new_tokens": 3, "eos_token_id": None}


def bar(figure):
    """The prompt's bar: where each part begins, its tokens, and where its KV came from."""
    return [
        (round(patch.get_x()), round(patch.get_width()), NAMES[to_hex(patch.get_facecolor())])
        for patch in figure.axes[0].patches
    ]


def ticks(figure):
    """The runs of recomputed tokens."""
    found = []
    for collection in figure.axes[0].collections:
        for path in collection.get_paths():
            low, high = path.get_extents().x0, path.get_extents().x1
            found.append((round(low), round(high)))
    return found


def words(figure):
    return [text.get_text() for text in figure.findobj(lambda item: hasattr(item, "get_text")) if text.get_text()]


def test_the_bar_is_the_prompt(rag):
    found = rag.finder.found(QUESTION, Retrieval(top_k=3)).chunks
    rag.engine.store.remove(rag.engine.documents.key(found[-1]))
    answer = rag.ask(QUESTION, **SHORT, method=LegoLink(k=4))
    fusion, figure = answer.report.fusion, answer.report.plot()
    assert [(chunk.name, chunk.number, chunk.tokens) for chunk in fusion.chunks] == [
        (hit.source, hit.position, len(chunk)) for hit, chunk in zip(answer.sources, found, strict=True)
    ]
    parts = [part for part in bar(figure) if part[2] not in ("prompt", "fresh")]
    at, want = fusion.prefix_tokens, []
    for chunk, source in zip(found, fusion.sources, strict=True):
        want.append((at, len(chunk), source))
        at += len(chunk)
    assert parts == want and want[-1][2] == "computed"
    assert sum(width for _, width, _ in bar(figure)) == at + fusion.suffix_tokens
    assert ticks(figure) == fusion.recomputed
    assert sum(stop - start for start, stop in fusion.recomputed) == fusion.tokens["recomputed"] > 0
    told = " ".join(words(figure))
    assert all(hit.source in told for hit in answer.sources) and "First token after" in told and "2 tokens more" in told


def test_a_prompt_that_was_begun_before(rag):
    report = rag.ask(QUESTION, **SHORT).report
    report.first_token_ms = 0.25
    assert "the prompt begun before" not in " ".join(words(report.plot()))
    report.fusion.speculated = "used"
    assert "First token after 0.2 ms, the prompt begun before" in " ".join(words(report.plot()))


@pytest.mark.parametrize("method", [Reuse(), FullPrefill()], ids=str)
def test_nothing_and_all_recomputed(rag, method):
    fusion = (report := rag.ask(QUESTION, **SHORT, method=method).report).fusion
    begin = fusion.prefix_tokens
    assert fusion.recomputed == ([] if method == Reuse() else [(begin, begin + fusion.chunk_tokens)])
    assert ticks(report.plot()) == fusion.recomputed
    plain = json.loads(json.dumps(report.as_dict()))["fusion"]
    assert plain["recomputed"] == [list(run) for run in fusion.recomputed]
    assert [chunk["source"] for chunk in plain["chunks"]] == fusion.sources


def test_tokens_are_taken_from_the_device_when_somebody_asks(rag, monkeypatch):
    copied = []
    tolist = torch.Tensor.tolist
    report = rag.ask(QUESTION, **SHORT, method=LegoLink(k=4)).report
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: copied.append(self is report.fusion.rows) or tolist(self))
    assert report.fusion.tokens and not copied
    assert report.fusion.recomputed and copied == [True]


def test_in_a_session_what_stands_in_the_prompt_is_no_chunk_of_the_turn(rag):
    session = rag.session()
    first = session.ask(QUESTION, **SHORT).report
    again = session.ask(QUESTION, **SHORT).report
    assert [part[2] for part in bar(first.plot())].count("cpu") == 3
    fusion = again.fusion
    assert (fusion.chunks, fusion.sources) == ([], ["prompt"] * 3)
    assert bar(again.plot())[0] == (0, fusion.reused_tokens, "prompt")
    assert sum(width for _, width, _ in bar(again.plot())) == fusion.prefix_tokens + fusion.suffix_tokens
    assert any("3 passages found for the question stood in the prompt already" in text for text in words(again.plot()))
    other = session.ask("Who leads Dexvia Labs?", **{**SHORT, "top_k": 6}).report.fusion
    assert [chunk.source for chunk in other.chunks] == [source for source in other.sources if source != "prompt"] != []


@pytest.mark.parametrize("chunks", [1, 5, 40])
def test_everything_is_inside_the_picture(chunks):
    """Also names that are long, or formulas to matplotlib, or what a terminal would obey."""
    placed = [
        ChunkReport(f"/a/{'long/' * 30}$many$_\x1b[0m-{number}.pdf", "d", number, 200, "cpu")
        for number in range(chunks)
    ]
    rows = torch.arange(10, 10 + 200 * chunks, 3)
    fusion = FusionReport("m", "sdpa", "reference", 10, 200 * chunks, 20, chunks=placed, rows=rows)
    figure = AnswerReport(fusion, 12.0, 30.0, 4).plot()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.draw_without_rendering()
    drawn, whole = figure.get_tightbbox(), figure.bbox_inches
    assert whole.contains(drawn.x0, drawn.y0) and whole.contains(drawn.x1, drawn.y1)
    key = [text.get_window_extent() for text in figure.axes[1].texts]
    assert len(key) == chunks and not any(one.overlaps(other) for at, one in enumerate(key) for other in key[:at])


def test_documents_without_a_name_are_numbered(model):
    with open_rag(model=model) as rag:
        one, two = (rag.engine.add_document([f"{word} passage", "another"]) for word in ("First", "Second"))
        told = words(rag.engine.generate([*one, two[1]], "Where?", max_new_tokens=1).report.plot())
    assert [text.split(":")[0] for text in told if "document" in text and text[0].isdigit()] == [
        "1  document 1, 1",
        "2  document 1, 2",
        "3  document 2, 2",
    ]


def test_without_matplotlib(rag, monkeypatch):
    report = rag.ask(QUESTION, **SHORT).report
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'ragkv\[plots\]'"):
        report.plot()


def test_svg_is_of_the_page(rag):
    drawn = svg(rag.ask(QUESTION, **SHORT).report.plot(), 'a <b> & "c"')
    assert (
        drawn.startswith('<svg role="img" aria-label="a &lt;b&gt; &amp; &quot;c&quot;"')
        and "<title>a &lt;b&gt;" in drawn
    )
    assert "currentColor" in drawn and "#1d2026" not in drawn and "clearport.md" in drawn

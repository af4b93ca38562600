"""A folder in one file: documents, vectors, readings and KV, there and back, merged, damaged, made by an enemy."""

import io
import json
import tarfile

import numpy as np
import pytest
from safetensors.numpy import load, save

from ragkv import RAG, IncompatibleFolderError, RagKVError, RecordError
from ragkv.exchange import export_folder, import_folder
from ragkv.folder.archive import Exchanged
from ragkv.retrieval import Catalogue
from ragkv.retrieval.exchange import sealed
from ragkv.store.disk import DiskTier
from ragkv.store.exchange import export, import_records
from ragkv.store.maintenance import entries

from .rags import DOCUMENTS, QUESTION, WordEmbedder, open_rag, small_model

ROOM = 1 << 30
TEXTS = dict(list(DOCUMENTS.items())[:3])


@pytest.fixture(scope="module")
def answer(model, tmp_path_factory):
    """What the folder answers that the archive is of, and the archive."""
    place = tmp_path_factory.mktemp("made")
    with open_rag(place / "folder", model) as rag:
        rag.add_texts(list(TEXTS.values()), list(TEXTS), [{"n": number} for number in range(3)])
        rag.retriever.catalogue.keep_defaults({"model": "some/model", "trust_remote_code": True})
        want = rag.ask(QUESTION, max_new_tokens=4)
        counts = Exchanged(3, len(rag.engine.store))
    assert export_folder(place / "folder", place / "all.tar") == counts
    return want, place / "all.tar", counts


@pytest.fixture
def archive(answer, tmp_path):
    """The archive's bytes in a file that a test may spoil."""
    file = tmp_path / "all.tar"
    file.write_bytes(answer[1].read_bytes())
    return file


def sources(folder):
    with Catalogue(folder / "documents") as catalogue:
        assert catalogue.check() == []
        return {document.source: catalogue.texts(document.source) for document in catalogue}


def unchanged(text):
    raise AssertionError(f"nothing may be computed or tokenised, got {text!r:.60}")


def test_an_empty_folder_answers_at_once(model, answer, archive, tmp_path, reads, monkeypatch):
    want, _, counts = answer
    seen = []
    assert import_folder(tmp_path / "other", archive, disk_bytes=ROOM, progress=seen.append) == counts
    assert seen == list(range(1, counts.documents + counts.records + 1))
    monkeypatch.setattr(WordEmbedder, "encode_documents", lambda self, texts: unchanged(texts))
    with open_rag(tmp_path / "other", model) as rag:
        passes, said = reads(rag.engine), []
        encode = rag.engine.encoder.ids
        monkeypatch.setattr(rag.engine.encoder, "ids", lambda text, **more: said.append(text) or encode(text, **more))
        got = rag.ask(QUESTION, max_new_tokens=4)
        assert (got.token_ids, got.report.fusion.hits, said) == (want.token_ids, {"disk": 5}, [QUESTION])
        assert [(hit.source, hit.text, hit.metadata, hit.span) for hit in got.sources] == [
            (hit.source, hit.text, hit.metadata, hit.span) for hit in want.sources
        ]
        assert rag.add_texts(list(TEXTS.values()), list(TEXTS), [{"n": n} for n in range(3)]).tokens_read == 0
        assert rag.refresh() == sum(passes) == 0
        assert rag.retriever.catalogue.defaults["model"] == "some/model"
    assert import_folder(tmp_path / "other", archive, disk_bytes=ROOM) == Exchanged(
        documents_there=3, records_there=counts.records
    ), "what is there stays, and is not counted as new"
    assert export_folder(tmp_path / "other", tmp_path / "again.tar") == counts


def test_a_forged_default_runs_nothing(archive, tmp_path, monkeypatch):
    import_folder(tmp_path / "other", archive, disk_bytes=ROOM)
    said = {}

    def load_model(name, device, options, *rest):
        said.update(name=name, options=options)
        raise RagKVError("enough")

    monkeypatch.setattr("ragkv.opening.load_model", load_model)
    with pytest.raises(RagKVError, match="enough"):
        RAG.open(tmp_path / "other", embedder=WordEmbedder())
    assert said == {"name": "some/model", "options": {}}


def test_documents_merge_by_source(model, answer, archive, tmp_path):
    want, _, counts = answer
    (same, other, _), folder = TEXTS, tmp_path / "there"
    with open_rag(folder, model) as rag:
        rag.add_texts([TEXTS[same], "Another text.", "A third."], [same, other, "mine"], [{"n": 0}, {}, {}])
        rag.retriever.catalogue.keep_defaults({"model": "mine"})
        mine = len(rag.engine.store)
    done = import_folder(folder, archive, disk_bytes=ROOM)
    assert (done.documents, done.documents_there, done.kept) == (1, 1, [other]) and 0 < done.useless < counts.records
    assert sources(folder)[other] == ["Another text."] and sources(folder).keys() == {*TEXTS, "mine"}
    assert len(list(entries(folder / "kv"))) == mine + done.records
    with open_rag(folder, model) as rag:
        assert rag.refresh() == 0 and rag.retriever.catalogue.defaults == {"model": "mine"}
    done = import_folder(folder, archive, disk_bytes=ROOM, replace=True)
    assert (done.documents, done.documents_there, done.kept, done.useless) == (1, 2, [], 0)
    with open_rag(folder, model) as rag:
        assert rag.refresh() == 0 and len(rag.engine.store) == mine + counts.records - 1 - len(
            rag.chunker.split(TEXTS[same])
        )
        rag.remove("mine")
        assert rag.ask(QUESTION, max_new_tokens=4).token_ids == want.token_ids


def test_kv_of_versions_that_are_not_taken_are_left_out_in_a_namespace_too(model, tmp_path):
    """There entries have no label, which would tell their document."""
    for name, text in (("one", "A text about the harbour."), ("two", "Another text.")):
        with open_rag(tmp_path / name, model, namespace="mine") as rag:
            rag.add_texts([text], ["same"])
    export_folder(tmp_path / "one", tmp_path / "one.tar")
    done = import_folder(tmp_path / "two", tmp_path / "one.tar", disk_bytes=ROOM)
    assert (done.kept, done.records, done.useless) == (["same"], 0, 1)
    assert len(list(entries(tmp_path / "two" / "kv"))) == 1


def test_readings_of_another_model_go_in_beside(model, answer, archive, tmp_path):
    folder, other = tmp_path / "there", small_model(seed=1)
    with open_rag(folder, other) as rag:
        rag.add_texts(list(TEXTS.values()), list(TEXTS))  # the same passages, other metadata
        before = len(rag.engine.store)
    done = import_folder(folder, archive, disk_bytes=ROOM)
    assert (done.documents, done.kept, done.records, done.useless) == (0, list(TEXTS), before, 0)
    for either in (model, other):
        with open_rag(folder, either) as rag:
            assert rag.refresh() == 0 and rag.ask(QUESTION, max_new_tokens=1).sources[0].metadata == {}


def test_another_embedder_is_refused_before_anything_is_written(model, archive, tmp_path):
    with open_rag(tmp_path / "there", model, WordEmbedder("others")) as rag:
        rag.add_texts(["A text."], ["mine"])
    before = {file: file.read_bytes() for file in (tmp_path / "there").rglob("data.mdb")}
    with pytest.raises(IncompatibleFolderError, match=r"made with the embedder others .*, got words"):
        import_folder(tmp_path / "there", archive, disk_bytes=ROOM)
    assert {file: file.read_bytes() for file in (tmp_path / "there").rglob("data.mdb")} == before
    assert import_records(tmp_path / "there" / "kv", archive, disk_bytes=ROOM).records > 0, "its KV alone can be had"


def test_archives_of_kv_alone(model, answer, archive, tmp_path):
    """Those of the version before are of this form."""
    _, made, counts = answer
    assert export(made.parent / "folder" / "kv", tmp_path / "kv.tar") == Exchanged(records=counts.records)
    with tarfile.open(tmp_path / "kv.tar") as packed:
        end = json.loads(packed.extractfile("end.json").read())
    assert end == {"format": "ragkv-archive-1", "records": counts.records}
    assert import_folder(tmp_path / "other", tmp_path / "kv.tar", disk_bytes=ROOM) == Exchanged(0, counts.records)
    assert not (tmp_path / "other" / "documents").exists()
    with pytest.raises(RagKVError, match="holds KV and no documents"):
        import_folder(made.parent / "folder" / "kv", archive, disk_bytes=ROOM)


def test_a_document_that_is_removed_meanwhile_leaves_no_kv(archive, tmp_path, monkeypatch):
    """By another process, at the worst moment: between the look at what names a record and its storing."""
    gone, admit = [], DiskTier.admit

    def admitted(tier, offers, *rest):
        with Catalogue(tmp_path / "other" / "documents") as catalogue:
            for document in catalogue.documents() if not gone else ():
                tier.remove(catalogue.remove(document.source).unused)
                gone.append(document.source)
        return admit(tier, offers, *rest)

    monkeypatch.setattr(DiskTier, "admit", admitted)
    done = import_folder(tmp_path / "other", archive, disk_bytes=ROOM)
    assert len(gone) == done.documents == 3 and (done.records, done.useless > 1) == (0, True)
    assert list(entries(tmp_path / "other" / "kv")) == [] and sources(tmp_path / "other") == {}


def test_damaged_documents_are_named_and_the_rest_is_exported(answer, archive, tmp_path, caplog):
    import_folder(tmp_path / "other", archive, disk_bytes=ROOM)
    with Catalogue(tmp_path / "other" / "documents") as catalogue:
        (first, second, third) = catalogue.documents()
        with catalogue._environment.transaction(write=True) as txn:
            key = bytes.fromhex(first.id)
            txn.put("documents", key, txn.get("documents", key)[:-3] + b"???")
            key = second.passage_ids[0].to_bytes(8, "big")
            txn.put("passages", key, txn.get("passages", key)[:-3] + b"???")
    done = export_folder(tmp_path / "other", tmp_path / "rest.tar")
    assert (done.documents, sorted(done.damaged)) == (1, sorted([f"document {first.id}", second.source]))
    assert f"document {first.id} is not exported: " in caplog.text and f"{second.source} is not exported" in caplog.text
    import_folder(tmp_path / "third", tmp_path / "rest.tar", disk_bytes=ROOM)
    assert sources(tmp_path / "third").keys() == {third.source}


def members(file):
    with tarfile.open(file) as packed:
        return [(member, member.name, packed.extractfile(member).read()) for member in packed]


def test_cut_short_and_flipped(answer, archive, tmp_path, model):
    """What is whole is taken in, the rest is named, and what was there before stays."""
    whole = archive.read_bytes()
    inside = members(archive)
    with open_rag(tmp_path / "there", model) as rag:
        rag.add_texts(["A text."], ["mine"])
    for number, (member, name, _) in enumerate(inside):
        for cut in (member.offset_data, member.offset_data + member.size // 2):
            archive.write_bytes(whole[:cut])
            left = [other for _, other, _ in inside[:number]]
            folder = tmp_path / f"cut {cut}"
            with pytest.raises(RecordError, match=r"all.tar was cut short; taken in: "):
                import_folder(folder, archive, disk_bytes=ROOM)
            got = sources(folder) if (folder / "documents").exists() else {}
            assert len(got) == sum(name.startswith("documents/") for name in left)
    for number, (member, name, _) in enumerate(inside[:-1]):
        archive.write_bytes(whole)
        with open(archive, "r+b") as file:
            file.seek(member.offset_data + member.size // 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 4]))
        with pytest.raises(RecordError, match=name):
            import_folder(tmp_path / "there", archive, disk_bytes=ROOM)
        assert sources(tmp_path / "there")["mine"] == ["A text."]
        assert len(sources(tmp_path / "there")) == (1 if not number else 3 if number == 1 else 4)
    with open_rag(tmp_path / "there", model) as rag:
        assert rag.refresh() == 0


def forged(archive, change):
    """The archive with another document of its own making in the place of its first."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as file:
        for info, name, content in members(archive):
            if name.startswith("documents/") and change is not None:
                arrays = load(content)
                facts = json.loads(arrays["document"].tobytes())
                name = change(facts, arrays) or name
                arrays["document"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
                content, change = save(arrays), None
                info.pax_headers["RAGKV.xxh3_64"] = sealed(name, content).checksum
            info.name, info.size = name, len(content)
            info.pax_headers = {key: value for key, value in info.pax_headers.items() if key.startswith("RAGKV")}
            file.addfile(info, io.BytesIO(content))
    return data.getvalue()


FORGERIES = [
    lambda facts, arrays: facts.update(texts=["other"]),
    lambda facts, arrays: facts.update(source="another"),
    lambda facts, arrays: facts.update(source=3),
    lambda facts, arrays: facts.update(spans=[[0, 1]]),
    lambda facts, arrays: facts.update(spans=[["a", "b"]] * len(facts["texts"])),
    lambda facts, arrays: facts.update(pages=[1]),
    lambda facts, arrays: facts.update(headings=[3] * len(facts["texts"])),
    lambda facts, arrays: facts.update(metadata=[1]),
    lambda facts, arrays: facts.update(passage_ids=[1]),
    lambda facts, arrays: facts.pop("passage_ids"),
    lambda facts, arrays: facts.update(settings=["ab"]),
    lambda facts, arrays: facts.pop("origin") and facts.update(origin=5),
    lambda facts, arrays: arrays.update(vectors=arrays["vectors"][1:]),
    lambda facts, arrays: arrays.update(vectors=arrays["vectors"] * np.nan),
    lambda facts, arrays: arrays.update({"keys.0": arrays["keys.0"][:, :31].copy()}),
    lambda facts, arrays: arrays.update({"keys.0": arrays["keys.0"][1:]}),
]


@pytest.mark.parametrize("change", FORGERIES)
def test_documents_that_cannot_be(archive, tmp_path, change):
    archive.write_bytes(forged(archive, change))
    with pytest.raises(RecordError, match=r"taken in: 2 documents, .*not: documents/\w+.safetensors is damaged"):
        import_folder(tmp_path / "other", archive, disk_bytes=ROOM)
    assert len(sources(tmp_path / "other")) == 2


def test_vectors_of_another_dimension(archive, tmp_path):
    archive.write_bytes(forged(archive, lambda facts, arrays: arrays.update(vectors=arrays["vectors"][:, 1:].copy())))
    with pytest.raises(RecordError, match="of another dimension"):
        import_folder(tmp_path / "other", archive, disk_bytes=ROOM)
    assert sources(tmp_path / "other")


def test_names_lead_nowhere(archive, tmp_path):
    for name in ("documents/../../evil", "../documents/" + "ab" * 32 + ".safetensors", "/etc/passwd"):
        archive.write_bytes(forged(archive, lambda facts, arrays, name=name: name))
        with pytest.raises(RecordError, match="belong there"):
            import_folder(tmp_path / "other", archive, disk_bytes=ROOM)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.tar", "other"]


def test_a_folder_keeps_its_own_defaults(archive, tmp_path):
    with Catalogue(tmp_path / "mine" / "documents") as catalogue:
        catalogue.keep_defaults({"model": "mine"})
    import_folder(tmp_path / "mine", archive, disk_bytes=1 << 30)
    with Catalogue(tmp_path / "mine" / "documents") as catalogue:
        assert catalogue.defaults == {"model": "mine"}


def test_a_newer_format_is_refused(answer, archive, tmp_path):
    data = json.dumps({"format": "ragkv-archive-9"}).encode()
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as file:
        info = tarfile.TarInfo("begin.json")
        info.size, info.pax_headers = len(data), {"RAGKV.xxh3_64": sealed("begin.json", data).checksum}
        file.addfile(info, io.BytesIO(data))
    archive.write_bytes(raw.getvalue())
    with pytest.raises(RecordError, match="of format 'ragkv-archive-9', this version reads 'ragkv-archive-2'"):
        import_folder(tmp_path / "other", archive, disk_bytes=ROOM)
    assert not (tmp_path / "other").exists()

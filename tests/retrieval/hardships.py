"""A folder with files of vectors, words and namespaces, whose processes are killed, and used by three at once.

Run as a program with a folder, in a process of its own that imports once and forks often. Prints one line of JSON.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
from processes import Embedder, forked, reported

from ragkv.chunk import digest
from ragkv.cli.verify import _documents as verified
from ragkv.retrieval import Catalogue, FaissIndex, Retriever
from ragkv.retrieval.segments import SegmentedIndex
from ragkv.retrieval.words import WordIndex

WORDS = ["harbour", "rope", "boat", "engine"]
NAMESPACES = ("", "ada")
TRACED = (
    "segments.py",
    "words.py",
    "arrays.py",
    "index.py",
    "retriever.py",
    "catalogue.py",
    "changes.py",
    "transaction.py",
)
SegmentedIndex.__init__.__defaults__ = (None, 60)


def text(source, version, place):
    return f"{source} version {version} place {place} {WORDS[place % 4]} {WORDS[version % 4]}"


def work(folder, log, seed, rounds):
    """Adds, replaces, removes, searches and saves; says before and after each change what it is."""
    rng = random.Random(seed)
    with open(log, "a", buffering=1) as out:
        retriever = Retriever.open(folder, Embedder())
        for version in range(rounds):
            source, namespace = f"document {rng.randrange(4)}", rng.choice(NAMESPACES)
            if retriever.catalogue.get(source, namespace) and rng.random() < 0.3:
                out.write(json.dumps(["try", source, namespace, "gone"]) + "\n")
                retriever.remove(source, namespace)
                out.write(json.dumps(["did", source, namespace, "gone"]) + "\n")
            else:
                texts = [text(source, seed * 100 + version, place) for place in range(rng.randrange(5, 30))]
                out.write(json.dumps(["try", source, namespace, digest(*texts).hex()]) + "\n")
                retriever.add(source, texts, {"even": len(texts) % 2 == 0}, namespace=namespace)
                out.write(json.dumps(["did", source, namespace, digest(*texts).hex()]) + "\n")
            if version % 2:
                retriever.search("rope", 3, hybrid=True, namespace=namespace)
            if version % 3 == 2:
                retriever.save()
        retriever.close()


def killed_after(lines, task, *args):
    """Runs something that is killed at the given line of its code; returns how many there were where it came to its end."""
    signal.alarm(120)
    count, number = 0, os.getpid()

    def traced(frame, event, arg):
        nonlocal count
        if event == "call":
            return traced if os.path.basename(frame.f_code.co_filename) in TRACED else None
        count += 1
        if count == lines:
            os.kill(number, signal.SIGKILL)
        return traced

    sys.settrace(traced)
    task(*args)
    sys.settrace(None)
    signal.alarm(0)
    return count


def check(folder):
    """All searches of all kinds are what the catalogue says; nothing is read but the folder."""
    embedder = Embedder()
    with Retriever.open(folder, embedder) as retriever, retriever.catalogue.snapshot() as view:
        assert retriever.catalogue.check() == []
        ids = view.passage_ids()
        assert sorted(retriever.index.ids()) == sorted(ids) == sorted(view.passage_ids())
        exact, fresh = FaissIndex(embedder.dimension), WordIndex(None)
        exact.add(ids, view.vectors(ids))
        for query in WORDS:
            vector = embedder.encode_query(query)
            got, want = retriever.index.search(vector, 9999), exact.search(vector, 9999)
            np.testing.assert_array_equal(got[0], want[0])
            np.testing.assert_allclose(got[1], want[1], rtol=1e-5)
            assert retriever._indexes.words.search(view, query, 9999) == fresh.search(view, query, 9999)
        for namespace in NAMESPACES:
            documents = list(view.documents(namespace))
            for options in ({}, {"hybrid": True}, {"where": {"even": True}, "hybrid": True}):
                wanted = [d for d in documents if "where" not in options or d.metadata.get("even")]
                hits = retriever.search("rope", 9999, namespace=namespace, **options)
                assert sorted(hit.text for hit in hits) == sorted(t for d in wanted for t in view.texts(d))
        return len(retriever.index._segments)


def kept(folder, log):
    """Every change that returned is there; the one that was cut off is there whole or not at all."""
    done, cut_off = {}, {}
    for line in Path(log).read_text().splitlines():
        word, *name, content = json.loads(line)
        cut_off = {**done, tuple(name): content}
        if word == "did":
            done = cut_off
    with Catalogue(folder) as catalogue:
        found = {(d.source, d.namespace): d.content_hash for d in catalogue}
    wanted = [{name: content for name, content in states.items() if content != "gone"} for states in (done, cut_off)]
    assert found in wanted, (found, wanted)
    Path(log).write_text("".join(json.dumps(["did", *name, content]) + "\n" for name, content in found.items()))
    return done != cut_off


def crash(folder, kills):
    rng, log, cut_off, segments = random.Random(0), f"{folder}.log", 0, 0
    Path(log).touch()
    lines = killed_after(0, work, f"{folder} calm", f"{folder} calm.log", 0, 9)
    for attempt in range(kills):
        child = forked(killed_after, rng.randrange(lines), work, folder, log, attempt, 9)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) in (0, signal.SIGKILL)
        cut_off += kept(folder, log)
        segments += check(folder)
    return {"cut off": cut_off, "segments": segments, "lines": lines}


def change(folder, until, gone):
    """Versions of two documents come and go; what is removed for good is noted, behind the removal."""
    rng, version = random.Random(1), 0
    with Retriever.open(folder, Embedder()) as retriever, open(gone, "a", buffering=1) as out:
        while time.monotonic() < until:
            version += 1
            for source in ("one", "two"):
                texts = [text(source, version, place) for place in range(rng.randrange(5, 40))]
                retriever.add(source, texts, namespace=NAMESPACES[version % 2])
            retriever.add(f"late {version}", [f"late {version} rope"])
            retriever.remove(f"late {version}")
            out.write(f"late {version}\n")
            if version % 4 == 0:
                retriever.save()


def ask(folder, until, gone):
    """Each question sees one version of a document, nothing of another namespace, and nothing that was gone before it."""
    asked = 0
    with Retriever.open(folder, Embedder()) as retriever:
        while time.monotonic() < until or not asked:
            removed = set(Path(gone).read_text().split("\n"))
            for namespace in NAMESPACES:
                for options in ({}, {"hybrid": True}, {"hybrid": True, "where": {"source": "one"}}):
                    hits = retriever.search("rope", 2, neighbours=99, namespace=namespace, **options)
                    versions = {(hit.source, hit.text.split(" place")[0]) for hit in hits if "late" not in hit.source}
                    assert len(versions) == len({source for source, _ in versions}), versions
                    assert not removed & {hit.source for hit in hits}
                    with retriever.catalogue.snapshot() as view:
                        for hit in hits:
                            document = view.by_id(hit.document_id)
                            assert document is None or document.namespace == namespace
                    asked += 1
    assert asked > 5, asked


def look(folder, until):
    """What another process writes is no damage."""
    looked = 0
    while time.monotonic() < until or looked <= 3:
        assert verified(Path(folder), False) == ([], [])
        looked += 1


def three(folder, seconds):
    Catalogue(folder).close()
    gone = f"{folder}.gone"
    Path(gone).touch()
    until = time.monotonic() + seconds
    children = [forked(change, folder, until, gone), forked(ask, folder, until, gone), forked(look, folder, until)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    return {"segments": check(folder), "removed": len(Path(gone).read_text().split("\n"))}


if __name__ == "__main__":
    folder, kills, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    print(
        json.dumps(
            {"crash": reported(crash, f"{folder}/crash", kills), "three": reported(three, f"{folder}/three", seconds)}
        )
    )

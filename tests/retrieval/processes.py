"""What a test does to processes: kills them, lets them write at the same time, takes the disk from them.

Run as a program with a folder, in a process of its own that imports once and forks often. Prints one line of JSON.
"""

import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np

from ragkv.chunk import digest
from ragkv.errors import StoreFullError
from ragkv.retrieval import Catalogue, Retriever

WORDS = ["harbour", "company", "net", "rope", "tar", "boat", "letter", "engine", "price", "end", "story", "nobody"]


class Embedder:
    name, dimension, fingerprint = "digest", 8, "digest/8"

    def encode_documents(self, texts):
        return np.stack([self.encode_query(text) for text in texts])

    def encode_query(self, text):
        return np.frombuffer(digest(text), np.uint8)[: self.dimension].astype(np.float32)


def forked(work, *args):
    """Runs a function in a child; returns the child's id."""
    child = os.fork()
    if child:
        return child
    try:
        work(*args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def passages(rng):
    return [" ".join(rng.choices(WORDS, k=40)) for _ in range(rng.randint(1, 30))]


def write_for_ever(folder, log, seed):
    rng = random.Random(seed)
    with open(log, "a", buffering=1) as out:
        retriever = Retriever.open(folder, Embedder())
        while True:
            source = f"document {rng.randrange(6)}"
            if retriever.catalogue.get(source) and rng.random() < 0.3:
                out.write(f"try {source[-1]} gone\n")
                retriever.remove(source)
                out.write(f"did {source[-1]} gone\n")
            else:
                texts = passages(rng)
                out.write(f"try {source[-1]} {digest(*texts).hex()}\n")
                retriever.add(source, texts)
                out.write(f"did {source[-1]} {digest(*texts).hex()}\n")
            if rng.random() < 0.3:
                retriever.save()


def verify(folder, log):
    """Every write that returned is there, the one that was cut off is there whole or not at all."""
    done, tried = {}, None
    for line in Path(log).read_text().splitlines():
        word, source, content = line.split()
        if word == "did":
            done[source], tried = content, None
        else:
            tried = source, content
    with Retriever.open(folder, Embedder()) as retriever, retriever.catalogue.snapshot() as view:
        found = {document.source[-1]: document.content_hash for document in view.documents()}
        done = {source: content for source, content in done.items() if content != "gone"}
        cut_off = dict(done)
        if tried:
            cut_off.pop(tried[0], None)
            cut_off.update({tried[0]: tried[1]} if tried[1] != "gone" else {})
        assert found in (done, cut_off), (found, done, cut_off)
        assert retriever.catalogue.check() == []
        ids = view.passage_ids()
        assert sorted(retriever.index.ids()) == sorted(ids)
        for passage_id in ids[:3]:
            text = view.passage(int(passage_id)).text
            _, scores = retriever.index.search(Embedder().encode_query(text), 1)
            assert scores[0] >= (Embedder().encode_query(text) ** 2).sum()
    # What counts as done from here on is what was found.
    Path(log).write_text("".join(f"did {source} {content}\n" for source, content in found.items()))
    return bool(tried), bool(tried) and found == cut_off


def crash(folder, kills):
    log, rng = f"{folder}.log", random.Random(0)
    Path(log).touch()
    cut_off = kept = written = 0
    for round in range(kills):
        size = os.path.getsize(log)
        child = forked(write_for_ever, folder, log, round)
        while os.path.getsize(log) == size:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        written += Path(log).read_text().count("did")
        tried, whole = verify(folder, log)
        cut_off, kept = cut_off + tried, kept + whole
    return {"written": written, "cut off": cut_off, "kept": kept}


def write_some(folder, who):
    rng = random.Random(who)
    with Retriever.open(folder, Embedder()) as retriever:
        for number in range(15):
            retriever.add(f"{who} {number}", [*passages(rng), "a text that all have"])
            if number % 3 == 2:
                retriever.remove(f"{who} {number - 1}")


def together(folder, writers):
    Catalogue(folder).close()
    children = [forked(write_some, folder, who) for who in range(writers)]
    with Retriever.open(folder, Embedder()) as retriever:
        searches = 0
        while children:
            hits = retriever.search("a text that all have", 5)
            assert all(hit.text for hit in hits)
            searches += 1
            done, status = os.waitpid(-1, os.WNOHANG)
            if done:
                assert status == 0
                children.remove(done)
        assert len(retriever.catalogue) == writers * 10
        assert retriever.catalogue.check() == []
        found = {hit.source for hit in retriever.search("a text that all have", 999)}
        assert found == {document.source for document in retriever.catalogue}
        return {"searches": searches, "passages": len(retriever.index)}


def full(folder):
    catalogue = Catalogue(folder)
    catalogue.put("first", ["a text"], Embedder().encode_documents)
    limit = os.path.getsize(f"{folder}/data.mdb") + (256 << 10)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    message, number = "", 0
    while not message:
        try:
            catalogue.put(f"document {number}", passages(random.Random(number)), Embedder().encode_documents)
            number += 1
        except StoreFullError as error:
            message = str(error)
    assert len(catalogue) == number + 1 and catalogue.check() == []
    # To remove, LMDB has to write too: somebody else has to make room first.
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    catalogue.remove("document 0")
    catalogue.put("second", ["another text"], Embedder().encode_documents)
    catalogue.close()
    with Catalogue(folder) as again:
        assert again.texts("second") == ["another text"] and again.check() == []
    return {"message": message, "documents": number}


def reported(work, *args):
    try:
        return work(*args)
    except Exception:
        return {"failed": traceback.format_exc()}


if __name__ == "__main__":
    folder = sys.argv[1]
    report = {
        "crash": reported(crash, f"{folder}/crash", 20),
        "together": reported(together, f"{folder}/together", 3),
        "full": reported(full, f"{folder}/full"),
    }
    print(json.dumps(report))

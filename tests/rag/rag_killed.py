"""A process that adds documents and is killed, again and again. Run with a folder; prints what it found, a line of JSON."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from rags import DOCUMENTS, QUESTION, open_rag, small_model


def _in_child(work):
    """Fork and do it there; no LMDB folder may be open yet."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def _add_all(folder, model, pipe):
    with open_rag(folder, model) as rag:
        os.write(pipe, b"begun")
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        rag.add_texts(["Clearport lies on the river Nowhere."], ["extra"])
        rag.ask(QUESTION, max_new_tokens=2, hybrid=True)
        rag.remove("extra")
        rag.refresh()
        os.write(pipe, b"done")


def _check(folder, model, report):
    with open_rag(folder, model) as rag:
        if rag.retriever.catalogue.check():
            raise AssertionError(rag.retriever.catalogue.check())
        texts = {**DOCUMENTS, "extra": "Clearport lies on the river Nowhere."}
        there = [document.source for document in rag.retriever.catalogue]
        if there:
            with open_rag(None, model) as fresh:
                fresh.add_texts([texts[source] for source in there], there)
                got, want = (each.ask(QUESTION, max_new_tokens=4, hybrid=True) for each in (rag, fresh))
            if (got.token_ids, [hit.text for hit in got.sources]) != (
                want.token_ids,
                [hit.text for hit in want.sources],
            ):
                raise AssertionError((got, want))
        report.write_text(str(len(DOCUMENTS.keys() & set(there))))


def _begin_adding(folder, model):
    """The process that adds, once it has begun to, and a pipe that says when it is done."""
    reading, writing = os.pipe()
    pid = _in_child(lambda: _add_all(folder, model, writing))
    os.close(writing)
    os.read(reading, 5)
    return pid, reading


def _kill_again_and_again(folder, times=5):
    model, chance, rounds = small_model(), random.Random(7), []
    pid, done = _begin_adding(folder / "calm", model)
    begin = time.monotonic()
    os.read(done, 4)
    adding_s = time.monotonic() - begin
    os.waitpid(pid, 0)
    for _ in range(times):
        pid, _ = _begin_adding(folder / "killed", model)
        time.sleep(chance.uniform(0, 0.8) * adding_s)
        os.kill(pid, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        checking = _in_child(lambda: _check(folder / "killed", model, folder / "report"))
        if os.waitpid(checking, 0)[1]:
            sys.exit("the folder of a killed process cannot be used")
        rounds.append({"killed": killed, "documents": int((folder / "report").read_text())})
    print(json.dumps(rounds))


if __name__ == "__main__":
    torch.set_num_threads(1)
    _kill_again_and_again(Path(sys.argv[1]))

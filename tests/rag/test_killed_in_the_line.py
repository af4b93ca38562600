"""A process is killed while threads stand in line, and one of their prompts is made: the folder serves the next one as it was."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock

from ragkv import LegoLink, Scheduler
from ragkv.folder.environment import Environment
from ragkv.fusion.placement import Placement
from ragkv.model.steps import Steps

from .rags import DOCUMENTS, QUESTION, open_rag

TEXTS = dict(list(DOCUMENTS.items())[:2])
QUESTIONS = [f"{QUESTION} {number}" for number in range(8)]
SHORT = {"max_new_tokens": 2, "min_new_tokens": 2, "top_k": 2}
# What is under way when the process ends: records are written and not committed, chunks are placed, answers are decoded.
MOMENTS = {"writing": (Environment, "_writing"), "placing": (Placement, "ahead"), "decoding": (Steps, "_forward")}


def asked_at_once(rag):
    """Answers, token by token, of as many threads as there are questions, and prompts that are fused together."""

    def ask(question):
        return rag.ask(question, **SHORT).token_ids

    with ThreadPoolExecutor(len(QUESTIONS) + 1) as pool:
        asking = [pool.submit(ask, question) for question in QUESTIONS]
        passages = rag.chunks(rag.retrieve(QUESTION, top_k=2))
        fused = rag.engine.fuse_many([(passages, question) for question in QUESTIONS[:3]])
        return [one.result() for one in asking], [prompt.logits.argmax().item() for prompt in fused]


def killed_at(moment, folder, model):
    """Ask, and end as by ``kill -9`` the second time that something is under way while somebody stands in line."""
    (owner, name), lock, seen = MOMENTS[moment], Lock(), []
    real = getattr(owner, name)
    with open_rag(folder, model, method=LegoLink(4), scheduler=Scheduler("cached-first")) as rag:
        if moment == "writing":  # what was lost is read again on the way
            rag.engine.store.remove_many(key for source in TEXTS for key in rag._keys(source))

        def perhaps():
            with lock:
                seen.extend([name] if rag.engine.scheduler.stats().waiting else [])
                if len(seen) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)

        @contextmanager
        def written(*args, **options):
            with real(*args, **options) as txn:
                yield txn
                perhaps()

        def done(*args, **options):
            value = real(*args, **options)
            perhaps()
            return value

        setattr(owner, name, written if moment == "writing" else done)
        asked_at_once(rag)
    return "nobody killed it"


def answers_of(folder, model):
    with open_rag(folder, model, method=LegoLink(4)) as rag:
        assert rag.retriever.catalogue.check() == []
        assert not rag.engine.store.stats().evictions["disk"].get("damaged")
        return asked_at_once(rag)


def test_the_folder_opens_and_says_the_same(model, tmp_path, forked):
    def begin():
        with open_rag(tmp_path, model, method=LegoLink(4)) as rag:
            rag.add_texts(list(TEXTS.values()), list(TEXTS))
            return asked_at_once(rag)

    want = forked(begin)
    assert want.startswith("([[")
    for moment in MOMENTS:  # each opens what the one before left
        assert forked(lambda at=moment: killed_at(at, tmp_path, model)) == f"signal {signal.SIGKILL.value}"
    assert forked(lambda: answers_of(tmp_path, model)) == want

"""Prompts that are fused together, by several threads, beside answers of others: each is what it is alone."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ragkv import Engine, PromptTemplate, Scheduler, TieredStore
from ragkv.bundled import MODEL_PATH
from ragkv.store.batch import Batch
from ragkv.testing import random_ids, shows_attention, tiny_model

from .test_many_soak import damaged_now_and_then

TEMPLATE = PromptTemplate(prefix=[1, 5, 6], after_chunk=[10], before_question=[11], after_question=[12, 13])
METHODS = ("lego-link:k=4", "reuse", "cache-blend:ratio=0.3", "question-aware:ratio=0.2")
NO_END = {"max_new_tokens": 4, "eos_token_id": None}
KV = 31 * 4 * 2 * 2 * 16 * 4  # bytes of the longest chunk


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(MODEL_PATH, local_files_only=True)


def engine_of(architecture, tokenizer, **options):
    model = tiny_model(architecture, vocab_size=len(tokenizer))
    return Engine(model, tokenizer, template=TEMPLATE, piece_tokens=16, **options)


def at_once(calls):
    ready = threading.Barrier(len(calls), timeout=60)

    def begin(call):
        ready.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [begun.result(120) for begun in [pool.submit(begin, call) for call in calls]]


def same(got, want):
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
    assert got.input_ids.tolist() == want.input_ids.tolist()
    for layer, other in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.values, other.values, atol=1e-4, rtol=1e-4)


def mixed(engine, seed, methods=METHODS):
    """What is fused, what is answered, and what each gives alone."""
    rng, texts = random.Random(seed), [random_ids(n) for n in (17, 20, 31, 9)]
    engine.add(texts)

    def one():
        return rng.sample(texts, rng.randrange(1, 4)), random_ids(rng.randrange(4, 12))

    groups = [([one() for _ in range(rng.randrange(2, 4))], method) for method in methods]
    asked = [(one(), method) for method in methods[:2]]
    prompts = [[engine.fuse(*each, method=method) for each in group] for group, method in groups]
    answers = [engine.generate(*each, method=method, **NO_END).text for each, method in asked]
    return groups, asked, prompts, answers


def check_together(engine, groups, asked, prompts, answers):
    calls = [lambda g=group, m=method: engine.fuse_many(g, method=m) for group, method in groups]
    calls += [lambda a=each, m=method: engine.generate(*a, method=m, **NO_END).text for each, method in asked]
    calls += [lambda a=each, m=method: "".join(engine.stream(*a, method=m, **NO_END)) for each, method in asked]
    got = at_once(calls)
    for group, want in zip(got, prompts, strict=False):
        for mine, alone in zip(group, want, strict=True):
            same(mine, alone)
    assert got[len(groups) :] == answers * 2
    line = engine.scheduler.stats()
    assert (line.waiting, line.running, line.bytes) == (0, 0, 0)
    assert line.namespaces[""].refused == 0


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss", "stablelm"])
def test_each_is_what_it_is_alone(architecture, tokenizer):
    engine, packs = engine_of(architecture, tokenizer), shows_attention(architecture)
    check_together(
        engine, *mixed(engine, 0, METHODS if packs else METHODS[:3])
    )  # GPT-J's attention is not open to view
    assert engine.runner.steps().packs == packs


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_with_little_memory_a_store_that_evicts_and_records_that_prove_damaged(tokenizer, monkeypatch, tmp_path, seed):
    line = Scheduler("cached-first", memory_bytes=5 * 150 * 4 * 2 * 2 * 16 * 4)
    with engine_of(
        "llama", tokenizer, store=TieredStore(tmp_path, cpu_bytes=2 * KV, disk_bytes=1 << 20), scheduler=line
    ) as engine:
        begun = mixed(engine, seed)
        monkeypatch.setattr(Batch, "_reading", damaged_now_and_then(Batch._reading, random.Random(seed)))
        check_together(engine, *begun)
        assert not engine.runner.steps()._seats and not engine.store._tiers.leases

"""Decoding: answers are the model's own, nothing runs twice, the cache grows in place."""

import threading
from time import perf_counter

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ragkv import ArgumentError, FullPrefill, LegoLink, Reuse
from ragkv.model.cache import FusedCache
from ragkv.model.decoding import decode
from ragkv.model.generation import Settings
from ragkv.model.proposals import Lookup
from ragkv.testing import as_cache, random_ids, tiny_model

from .conftest import QUESTION, full


def test_greedy_answers_are_transformers_own(engine):
    chunks = engine.add([random_ids(40), random_ids(50)])
    prompt = engine.fuse(chunks, QUESTION, method=FullPrefill())
    ids = prompt.input_ids
    want = engine.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    answer = engine.generate(chunks, QUESTION, method=FullPrefill(), max_new_tokens=20, eos_token_id=None)
    assert answer.token_ids == want[0, ids.shape[1] :].tolist()
    assert answer.report.new_tokens == 20
    assert answer.text == ""


def test_decoding_grows_in_place_and_never_runs_the_prompt_again(engine, monkeypatch):
    chunks = engine.add([random_ids(40), random_ids(50)])
    sizes, run = [], engine.decoder.step
    monkeypatch.setattr(
        engine.decoder, "step", lambda ids, *rest, **rows: (sizes.append(len(ids)), run(ids, *rest, **rows))[1]
    )
    made = []
    make = engine.decoder.cache
    monkeypatch.setattr(engine.decoder, "cache", lambda capacity: made.append(make(capacity)) or made[-1])
    engine.generate(chunks, QUESTION, max_new_tokens=12, eos_token_id=None)
    assert sizes == [6] + [1] * 11
    assert made[0].layers[0].key_room.shape[2] == 3 + 92 + 6 + 12  # no room was added: nothing was copied


class Circle(LogitsProcessor):
    """What is said follows a text of 12 tokens that stands in the prompt, with a slip now and then."""

    text = [*range(20, 32)]

    def __call__(self, input_ids, scores):
        last, slip = int(input_ids[0, -1]), input_ids.shape[1] % 7 == 0
        following = self.text[(self.text.index(last) + 1 + slip) % 12] if last in self.text else self.text[0]
        scores[:] = -torch.inf
        scores[0, following] = 0
        return scores


@pytest.mark.parametrize("said", ["by itself", "in circles"])
@pytest.mark.parametrize("lookup", [1, 4, 50])
def test_prompt_lookup_says_the_same_by_fewer_passes(engine, monkeypatch, lookup, said):
    chunks = engine.add([Circle.text * 2, random_ids(50)])
    own = {"logits_processor": [Circle()]} if said == "in circles" else {}
    asked = {"method": Reuse(), "max_new_tokens": 40, "eos_token_id": None, "logprobs": 1, "keep_past": True, **own}
    want = engine.generate(chunks, QUESTION, **asked)
    rows, run = [], engine.decoder.step
    monkeypatch.setattr(engine.decoder, "step", lambda *a, **k: (rows.append(k.get("rows")), run(*a, **k))[1])
    got = engine.generate(chunks, QUESTION, prompt_lookup_num_tokens=lookup, **asked)
    assert got.token_ids == want.token_ids
    torch.testing.assert_close(
        [one.logprob for one in got.logprobs], [one.logprob for one in want.logprobs], atol=1e-4, rtol=1e-4
    )
    assert max(rows[1:]) <= lookup + 1
    if own:
        assert len(rows) <= (20 if lookup > 1 else 30)  # of 40
    for a, b in zip(got.past.cache.layers, want.past.cache.layers, strict=True):
        assert a.key_room.shape == b.key_room.shape  # nothing is proposed beyond the room for the answer
        assert a.length == b.length  # nothing is left of what was proposed and not said
        torch.testing.assert_close(a.keys, b.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a.values, b.values, atol=1e-4, rtol=1e-4)


def test_what_is_proposed_stood_behind_the_last_such_place():
    proposed = lambda ids, most, longest: Lookup(9, longest).propose(torch.tensor([ids]), most)  # noqa: E731
    ids = [1, 2, 3, 1, 2, 4, 9, 1, 2]
    assert [proposed(ids, most, 3) for most in (0, 1, 2)] == [[], [4], [4, 9]]
    assert proposed([5, 1, 2, 3, 6, 1, 2, 4, 5, 1, 2], 1, 3) == [3]  # as many tokens as may be
    assert proposed([7, 8, 3, 8], 2, 1) == [3, 8] and proposed([7, 8, 3, 8], 2, 2) == []


@pytest.mark.parametrize(("longest", "rows"), [(1, 5), (2, 1)])
def test_how_many_tokens_find_a_place(engine, monkeypatch, longest, rows):
    """The first word of the answer stood in the prompt, behind another word."""
    ran, run = [], engine.decoder.step
    monkeypatch.setattr(engine.decoder, "step", lambda *a, **k: (ran.append(k.get("rows")), run(*a, **k))[1])
    lookup = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": longest, "logits_processor": [Circle()]}
    engine.generate(engine.add([Circle.text]), QUESTION, max_new_tokens=12, eos_token_id=None, **lookup)
    assert ran[1] == rows


def test_a_stream_that_is_closed_leaves_nothing_proposed(engine):
    prompt = engine.fuse(engine.add([Circle.text * 2]), QUESTION)
    settings = Settings(
        engine.decoder, None, {"prompt_lookup_num_tokens": 8, "logits_processor": [Circle()], "max_new_tokens": 30}
    )
    tokens = decode(settings, prompt, perf_counter(), engine.decoder.forward)
    said = [next(tokens) for _ in range(4)]
    tokens.close()
    assert prompt.past_key_values.get_seq_length() == prompt.input_ids.shape[1] + len(said) - 1


def test_lookup_that_cannot_be(engine):
    for given, says in (({"prompt_lookup_num_tokens": -1}, "must be >= 0"), ({"num_beams": 2}, "beams")):
        with pytest.raises(ArgumentError, match=f"prompt_lookup_num_tokens.*{says}"):
            engine.generate([random_ids(9)], QUESTION, **{"prompt_lookup_num_tokens": 2, **given})


def test_the_cache_grows_beyond_its_room(engine):
    chunks = engine.add([random_ids(40)])
    prompt = engine.fuse(chunks, QUESTION, room_tokens=0)
    cache, ids = prompt.past_key_values, prompt.input_ids
    token = prompt.logits.argmax(-1, keepdim=True)
    with torch.no_grad():
        step = engine.model(input_ids=token, **as_cache(cache)).logits[:, -1]
    want = full(engine.model, torch.cat([ids, token], dim=1))
    torch.testing.assert_close(step, want, atol=1e-4, rtol=1e-4)


def test_plain_generate_over_the_fused_cache(engine):
    chunks = engine.add([random_ids(40), random_ids(50)])
    prompt = engine.fuse(chunks, QUESTION)
    first = prompt.logits.argmax(-1, keepdim=True)
    ids = torch.cat([prompt.input_ids, first], dim=1)
    out = engine.model.generate(
        ids,
        **as_cache(prompt.past_key_values),
        attention_mask=torch.ones_like(ids),
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
    )
    answer = engine.generate(chunks, QUESTION, max_new_tokens=10, eos_token_id=None)
    assert out[0, prompt.input_ids.shape[1] :].tolist() == answer.token_ids


@pytest.mark.parametrize("proposing", ["prompt_lookup_num_tokens", "assistant_model"])
def test_plain_generate_that_would_compute_the_prompt_again(engine, proposing):
    """transformers' assisted decoding takes no account of what a cache holds, whatever its kind: another text came out."""
    prompt = engine.fuse(engine.add([random_ids(40), random_ids(50)]), QUESTION)
    ids = torch.cat([prompt.input_ids, prompt.logits.argmax(-1, keepdim=True)], dim=1)
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    asked["past_key_values"] = prompt.past_key_values
    with pytest.raises(ArgumentError, match=f"{proposing}.*engine.generate"):
        engine.model.generate(ids, **{proposing: {"assistant_model": tiny_model()}.get(proposing, 3)}, **asked)
    assert prompt.past_key_values.get_seq_length() == ids.shape[1] - 1  # as it was
    out = engine.model.generate(ids, **asked)
    want = engine.generate(engine.add([random_ids(40), random_ids(50)]), QUESTION, max_new_tokens=6, eos_token_id=None)
    assert out[0, ids.shape[1] - 1 :].tolist() == want.token_ids


def test_a_cache_that_transformers_crops_goes_on_from_what_it_holds(engine):
    """As it does on Apple's devices, where a pass too many is taken back."""
    prompt = engine.fuse(engine.add([random_ids(40)]), QUESTION)
    cache, token = prompt.past_key_values, prompt.logits.argmax(-1, keepdim=True)
    cache.activate_past_recording()
    with torch.no_grad():
        step = engine.model(input_ids=token, **as_cache(cache)).logits[:, -1]
    want = full(engine.model, torch.cat([prompt.input_ids, token], dim=1))
    torch.testing.assert_close(step, want, atol=1e-4, rtol=1e-4)


def test_generation_arguments(engine):
    chunks = engine.add([random_ids(40)])
    greedy = engine.generate(chunks, QUESTION, max_new_tokens=8, eos_token_id=None).token_ids
    stopped = engine.generate(chunks, QUESTION, max_new_tokens=8, eos_token_id=greedy[3]).token_ids
    assert stopped == greedy[: greedy.index(greedy[3]) + 1]
    torch.manual_seed(0)
    one = engine.generate(chunks, QUESTION, max_new_tokens=8, do_sample=True, temperature=5.0, eos_token_id=None)
    torch.manual_seed(0)
    two = engine.generate(chunks, QUESTION, max_new_tokens=8, do_sample=True, temperature=5.0, eos_token_id=None)
    assert one.token_ids == two.token_ids != greedy
    never = engine.generate(
        chunks, QUESTION, max_new_tokens=8, eos_token_id=None, suppress_tokens=[greedy[0]], repetition_penalty=1.3
    )
    assert greedy[0] not in never.token_ids

    class Only7(LogitsProcessor):
        def __call__(self, input_ids, scores):
            out = torch.full_like(scores, -torch.inf)
            out[:, 7] = 0
            return out

    forced = engine.generate(
        chunks, QUESTION, max_new_tokens=3, eos_token_id=None, logits_processor=LogitsProcessorList([Only7()])
    )
    assert forced.token_ids == [7, 7, 7]
    with pytest.raises(TypeError, match="max_new_token"):
        engine.generate(chunks, QUESTION, max_new_token=3)
    with pytest.raises(ValueError, match="num_return_sequences"):
        engine.generate(chunks, QUESTION, num_return_sequences=2, do_sample=True)


def test_beams(engine):
    chunks = engine.add([random_ids(40), random_ids(50)])
    ids = engine.fuse(chunks, QUESTION, method=FullPrefill()).input_ids
    want = engine.model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    got = engine.generate(chunks, QUESTION, method=FullPrefill(), num_beams=3, max_new_tokens=6, eos_token_id=None)
    assert got.token_ids == want[0, ids.shape[1] :].tolist()


def test_several_threads(engine):
    chunks = engine.add([random_ids(n) for n in (20, 30, 40)])
    want = {i: engine.generate(chunks[i:], QUESTION, max_new_tokens=6).token_ids for i in range(3)}
    wrong = []

    def ask(i):
        for _ in range(5):
            method = LegoLink(k=4) if _ % 2 else Reuse()
            got = engine.generate(chunks[i:], QUESTION, max_new_tokens=6, method=method).token_ids
            if method == Reuse() and got != want[i]:
                wrong.append((i, got))

    threads = [threading.Thread(target=ask, args=(i % 3,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_beam_bookkeeping_of_the_cache(engine):
    cache: FusedCache = engine.decoder.cache(8)
    for layer in cache.layers:
        layer.update(torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16))
    before = cache.layers[0].keys.clone()
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.crop(-2)
    assert cache.get_seq_length() == 3
    torch.testing.assert_close(cache.layers[0].keys, before[:, :, :3].repeat(2, 1, 1, 1))
    cache.batch_select_indices(torch.tensor([0]))
    cache.reset()
    assert cache.layers[0].keys.shape == (1, 2, 0, 16)

"""A token's step that runs before the token is known: the same answers, and nothing of what was run too much is ever seen."""

import pytest
import torch

from ragkv import Engine, ModelChangedError, PromptTemplate, Reuse
from ragkv.model import decoding
from ragkv.model.decoder import Decoder
from ragkv.testing import random_ids, tiny_model

PASSAGES, QUESTION = [random_ids(n) for n in (30, 17)], random_ids(6)


class Watched:
    """An engine whose answers run ahead, or do not; counts the forwards behind the prompt."""

    def __init__(self, early):
        template = PromptTemplate(prefix=[1, 5, 6], after_chunk=[10], before_question=[11], after_question=[12])
        self.engine = Engine(tiny_model(), template=template, kernels="reference", graphs=True, method=Reuse())
        self.steps = self.engine.documents.steps
        self.steps.graphs.early = early
        self.chunks = self.engine.add(PASSAGES)

    def say(self, **options):
        torch.manual_seed(0)
        before = self.steps.sizes.total()
        answer = self.engine.generate(self.chunks, QUESTION, **{"max_new_tokens": 8, "eos_token_id": None, **options})
        self.forwards = self.steps.sizes.total() - before - 1
        return answer


@pytest.fixture(scope="module")
def pair():
    return Watched(False), Watched(True)  # of two models, for one has one set of graphs


class Counting:
    """A logits processor and a stopping criterion that note in which order they are called, and with what."""

    def __init__(self, end=99):
        self.calls, self.end = [], end

    def processor(self, ids, scores):
        self.calls.append(("scores", ids.tolist()))
        return scores

    def criterion(self, ids, scores, **more):
        self.calls.append(("ends", ids.tolist()))
        return torch.tensor([ids.shape[1] >= self.end])


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 1.5}, {"max_new_tokens": 1}])
def test_the_same_answer(pair, options):
    plain, early = pair
    want, got = plain.say(**options), early.say(**options)
    assert got.token_ids == want.token_ids
    assert early.forwards == plain.forwards == len(want.token_ids) - 1  # the last token that there may be is known


def test_behind_an_end_token_nothing_is_left(pair):
    plain, early = pair
    end = plain.say().token_ids[3]
    want, got = (each.say(eos_token_id=end, keep_past=True) for each in pair)
    assert got.token_ids == want.token_ids and got.token_ids[-1] == end
    assert early.forwards == plain.forwards + 1  # the one that nobody asks for
    assert got.past.held == want.past.held == got.past.cache.layers[0].length
    for a, b in zip(got.past.cache.layers, want.past.cache.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=1e-4, rtol=1e-4)
    behind = [
        each.engine.generate([], random_ids(5), past=answer.past, max_new_tokens=5, eos_token_id=None).token_ids
        for each, answer in zip(pair, (want, got), strict=True)
    ]
    assert behind[0] == behind[1]


def test_whoever_looks_on_sees_the_same_in_the_same_order(pair):
    seen = []
    for each in pair:
        watch = Counting(end=70)
        each.say(logits_processor=[watch.processor], stopping_criteria=[watch.criterion])
        seen.append(watch.calls)
    assert seen[0] == seen[1] and len(seen[0]) > 4


def test_what_is_told_apart_from_a_device_is_told_on_the_host(pair, monkeypatch):
    """Criteria that go by ids anywhere are given those of the host, so that nobody waits for the step that runs."""
    early, given = pair[1], []
    plain = decoding._ends
    monkeypatch.setattr(decoding, "_ends", lambda criteria, ids: given.append(ids) or plain(criteria, ids))
    answer = early.say(eos_token_id=2)
    assert given[-1][0].tolist()[-len(answer.token_ids) :] == answer.token_ids
    assert len(given) == len(answer.token_ids)


def test_the_streamer_is_given_each_token(pair):
    seen = []
    for each in pair:
        puts = []
        streamer = type("Streamer", (), {"put": lambda _, ids, to=puts: to.append(ids.tolist()), "end": puts.clear})
        held = streamer()
        held.end = lambda to=puts: to.append("end")
        each.say(streamer=held)
        seen.append(puts)
    assert seen[0] == seen[1] and seen[0][-1] == "end" and len(seen[0]) == 10


def test_proposed_tokens_do_not_run_ahead(pair):
    plain, early = pair
    want, got = (each.say(prompt_lookup_num_tokens=3, max_new_tokens=12) for each in pair)
    assert got.token_ids == want.token_ids and early.forwards == plain.forwards


def test_log_probabilities_are_the_same(pair):
    want, got = (each.say(logprobs=2) for each in pair)
    assert [one.id for one in got.logprobs] == [one.id for one in want.logprobs]


def test_a_stream_that_is_left_leaves_nothing(pair):
    _, early = pair
    held = []
    prompt = early.engine.fuse(early.chunks, QUESTION)
    cache = prompt.past_key_values
    before = cache.layers[0].length
    settings = decoding.Settings(early.steps.decoder, None, {"max_new_tokens": 8, "eos_token_id": None})

    def forward(rows):
        held.append(rows.held)
        return early.steps.run(rows, prompt.fingerprint)

    said = decoding.decode(settings, prompt, 0.0, forward, early=True)
    next(said)
    assert cache.layers[0].length == before + 1
    said.close()
    assert cache.layers[0].length == before and held == [before]


def test_an_error_comes_behind_the_token_that_was_known(pair):
    _, early = pair
    prompt = early.engine.fuse(early.chunks, QUESTION)
    settings = decoding.Settings(early.steps.decoder, None, {"max_new_tokens": 8, "eos_token_id": None})

    def forward(rows):
        raise ModelChangedError("on purpose")

    said = decoding.decode(settings, prompt, 0.0, forward, early=True)
    assert next(said) == int(prompt.logits.argmax())
    with pytest.raises(ModelChangedError, match="on purpose"):
        next(said)
    assert prompt.past_key_values.layers[0].length == prompt.input_ids.shape[1]  # nothing was run too much


class OnGpu(torch.Tensor):
    device = torch.device("cuda", 0)


def test_nobody_draws_beside_a_capture(monkeypatch):
    """PyTorch would raise in whoever draws a token."""
    held = []

    def draw(weights, count):
        held.append(decoding.capturing.locked())
        return weights.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", draw)
    monkeypatch.setattr(decoding, "_reading", lambda numbers: numbers.tolist)
    for scores in (torch.ones(1, 9).as_subclass(OnGpu), torch.ones(1, 9)):
        decoding._Choice(scores, sample=True)
    assert held == [True, False] and not decoding.capturing.locked()


@pytest.mark.parametrize(
    "asked",
    [
        {"eos_token_id": [2, 9], "min_new_tokens": 3},
        {"do_sample": True, "top_p": 0.9, "temperature": 0.7, "repetition_penalty": 1.1, "no_repeat_ngram_size": 2},
    ],
)
def test_what_is_asked_of_an_answer_is_made_out_without_the_device(asked):
    """On a meta device: whoever looks at a number there fails, as on a GPU it would wait for the prompt."""
    said = torch.tensor([random_ids(9)])
    settings = decoding.Settings(Decoder(tiny_model()), None, {"max_new_tokens": 8, **asked})
    processors, criteria = settings.resolve(said.to("meta"), said, 0.0)
    assert processors and not bool(criteria(said, None).all())

"""A smaller model proposes tokens: the answer is the same, by fewer passes of the model, and nothing proposed is left anywhere."""

from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import pytest
import torch
from transformers import AutoConfig, AutoModel, LogitsProcessor, StoppingCriteria

from ragkv import ArgumentError, Engine, PromptTooLongError, Reuse
from ragkv.model.decoding import decode
from ragkv.model.generation import Settings
from ragkv.prompting import Prompting
from ragkv.testing import SMALL, random_ids, tiny_model

from .conftest import QUESTION, TEMPLATE

CHUNKS = [random_ids(40), random_ids(50)]
N = 3 + 41 + 51 + 6  # tokens of the prompt
ASKED = {"max_new_tokens": 14, "eos_token_id": None}


def eager(model, tokens=4):
    """Proposes so many tokens, however sure it is of them, and greedily, though its own settings say otherwise."""
    model.generation_config.update(do_sample=True, temperature=3.0, top_k=7, repetition_penalty=2.0)
    model.generation_config.assistant_confidence_threshold = 0.0
    model.generation_config.num_assistant_tokens = tokens
    return model


@pytest.fixture(scope="module")
def twin():
    """Says what the model says without a fused cache: often the same."""
    return eager(tiny_model())


@pytest.fixture(scope="module")
def stranger():
    """Of another kind and other weights."""
    return eager(tiny_model("gpt_neox", seed=5, num_hidden_layers=1))


@pytest.fixture
def passes(engine, monkeypatch):
    """Rows of each pass of the model."""
    rows, run = [], engine.decoder.step
    monkeypatch.setattr(engine.decoder, "step", lambda *a, **k: (rows.append(k.get("rows")), run(*a, **k))[1])
    return rows


class Never(LogitsProcessor):
    """Counts how often it is asked; forbids the last token."""

    def __init__(self):
        self.lengths = []

    def __call__(self, ids, scores):
        self.lengths.append(ids.shape[1])
        scores[0, ids[0, -1]] = -torch.inf
        return scores


class Enough(StoppingCriteria):
    def __call__(self, ids, scores, **rest):
        return torch.tensor([ids.shape[1] >= N + 6])


@pytest.mark.parametrize(
    "architecture", ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gptj", "gpt_oss", "llama4_text"]
)
def test_the_same_answer_on_many_architectures(architecture):
    engine = Engine(tiny_model(architecture), template=TEMPLATE, method=Reuse())
    chunks = engine.add(CHUNKS)
    want = engine.generate(chunks, QUESTION, keep_past=True, **ASKED)
    assistant = eager(tiny_model(architecture))
    got = engine.generate(chunks, QUESTION, keep_past=True, assistant_model=assistant, **ASKED)
    assert got.token_ids == want.token_ids
    for a, b in zip(got.past.cache.layers, want.past.cache.layers, strict=True):
        assert a.length == b.length and a.key_room.shape == b.key_room.shape
        torch.testing.assert_close(a.keys, b.keys, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "arguments",
    [
        {"logprobs": 2},
        {"do_sample": True, "temperature": 2.0},
        {"logits_processor": Never},
        {"stopping_criteria": Enough},
        {"repetition_penalty": 3.0},
        {"guidance_scale": 2.0},
        {"eos_token_id": "fifth"},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
    ],
    ids=lambda arguments: " ".join(map(str, arguments.items())).split("<")[0],
)
def test_the_same_answer_whatever_else_is_asked(engine, twin, arguments):
    chunks = engine.add(CHUNKS)
    fifth = engine.generate(chunks, QUESTION, **ASKED).token_ids[4]

    def ask(**more):
        torch.manual_seed(0)
        own = {name: [value()] if isinstance(value, type) else value for name, value in arguments.items()}
        own = {name: fifth if value == "fifth" else value for name, value in own.items()}
        answer = engine.generate(chunks, QUESTION, **{**ASKED, **own}, **more)
        return answer, [one for name in own if name == "logits_processor" for one in own[name][0].lengths]

    (want, lengths), (got, its) = ask(), ask(assistant_model=twin)
    assert got.token_ids == want.token_ids
    assert its == lengths  # what is proposed is not shown to processors
    assert got.logprobs == want.logprobs or [one.logprob for one in got.logprobs] == pytest.approx(
        [one.logprob for one in want.logprobs], abs=1e-4
    )


def test_one_that_says_the_same_saves_passes(engine, twin, passes):
    chunks = [random_ids(90)]  # read where it stands: the fused prompt is the model's own
    engine.generate(chunks, QUESTION, assistant_model=twin, **{**ASKED, "max_new_tokens": 16})
    assert passes[1:] == [5, 5, 5]  # of 15 tokens behind the first; one more is computed with each four


def test_how_many_are_proposed_is_what_the_assistants_settings_say(engine, passes):
    chunks = [random_ids(90)]
    unsure = eager(tiny_model(), 3)
    unsure.generation_config.assistant_confidence_threshold = 1.1
    engine.generate(chunks, QUESTION, assistant_model=unsure, **ASKED)
    assert max(passes[1:]) == 2  # it stops behind the first token that it is not sure of
    del passes[:]
    growing = eager(tiny_model(), 1)
    growing.generation_config.num_assistant_tokens_schedule = "heuristic"
    engine.generate(chunks, QUESTION, assistant_model=growing, **ASKED)
    assert passes[1:] == [2, 4, 6, 1]  # two more behind all that were right, and none beyond the answer
    assert growing.generation_config.num_assistant_tokens == 7  # kept for other answers, as transformers does


def test_the_assistant_reads_the_prompt_once(engine, twin):
    read = []
    hook = twin.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    engine.generate(engine.add(CHUNKS), QUESTION, assistant_model=twin, **ASKED)
    hook.remove()
    assert read[0] == N + 1 and max(read[1:]) <= 2  # with the first token, which it did not delay


def test_side_by_side(engine, twin, stranger):
    chunks = engine.add([random_ids(n) for n in (20, 30, 40)])
    want = [engine.generate(chunks[i:], QUESTION, **ASKED).token_ids for i in range(3)]
    prompts = [(chunks[i:], QUESTION) for i in range(3)]
    for assistant in (twin, stranger):
        answers = engine.generate_many(prompts, at_once=3, assistant_model=assistant, **ASKED)
        assert [answer.token_ids for answer in answers] == want


def test_an_engine_on_the_assistant_is_not_disturbed(engine, twin):
    """Fusion switches the attention of the model that it runs."""
    small, greedily = Engine(twin, template=TEMPLATE, method=Reuse()), {"do_sample": False, **ASKED}
    want = small.generate(CHUNKS, QUESTION, **greedily).token_ids
    own = engine.generate(CHUNKS, QUESTION, **ASKED).token_ids
    with ThreadPoolExecutor(4) as pool:
        theirs = [pool.submit(small.generate, CHUNKS, QUESTION, **greedily) for _ in range(3)]
        ours = [pool.submit(engine.generate, CHUNKS, QUESTION, assistant_model=twin, **ASKED) for _ in range(3)]
        assert {tuple(one.result().token_ids) for one in theirs} == {tuple(want)}
        assert {tuple(one.result().token_ids) for one in ours} == {tuple(own)}


def test_going_on_from_an_answer(engine, twin):
    chunks = engine.add(CHUNKS)

    def turns(**more):
        first = engine.generate(chunks, QUESTION, keep_past=True, **ASKED, **more)
        second = engine.generate([], random_ids(7), past=first.past, keep_past=True, **ASKED, **more)
        return first.token_ids, second.token_ids, second.past.cache.get_seq_length()

    assert turns(assistant_model=twin) == turns()


@pytest.mark.parametrize("said", [1, 2, 4])
def test_a_stream_that_is_closed_leaves_nothing_proposed(engine, twin, said):
    prompt = engine.fuse(engine.add([random_ids(90)]), QUESTION)
    settings = Settings(engine.decoder, None, {"assistant_model": twin, "max_new_tokens": 30, "eos_token_id": None})
    tokens = decode(settings, prompt, perf_counter(), engine.decoder.forward)
    for _ in range(said):
        next(tokens)
    tokens.close()
    assert prompt.past_key_values.get_seq_length() == prompt.input_ids.shape[1] + said - 1


def test_an_assistant_that_fails_leaves_nothing_proposed(engine, twin, monkeypatch):
    prompt = engine.fuse(engine.add([random_ids(90)]), QUESTION)
    settings = Settings(engine.decoder, None, {"assistant_model": twin, "max_new_tokens": 30, "eos_token_id": None})
    tokens = decode(settings, prompt, perf_counter(), engine.decoder.forward)
    said = [next(tokens) for _ in range(6)]  # the second pass of the model has been made
    monkeypatch.setattr(twin, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        said.extend(tokens)
    assert prompt.past_key_values.get_seq_length() == prompt.input_ids.shape[1] + len(said) - 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: "gpt2", "must be a loaded transformers model, got str"),
        (lambda: tiny_model(vocab_size=64), "a vocabulary of 64 tokens and the model one of 128"),
        (lambda: AutoModel.from_config(AutoConfig.for_model("llama", **SMALL)), "LlamaModel is none"),
    ],
)
def test_models_that_cannot_propose(engine, monkeypatch, make, says):
    monkeypatch.setattr(Prompting, "prompt", lambda *_: pytest.fail("the prompt was made"))
    with pytest.raises(ArgumentError, match=f"assistant_model.*{says}"):
        engine.generate(CHUNKS, QUESTION, assistant_model=make())


@pytest.mark.parametrize(
    ("other", "says"), [({"num_beams": 2}, "beams"), ({"prompt_lookup_num_tokens": 2}, "one of them")]
)
def test_what_it_does_not_go_with(engine, twin, other, says):
    with pytest.raises(ArgumentError, match=f"assistant_model.*{says}"):
        engine.generate(CHUNKS, QUESTION, assistant_model=twin, **other)


@pytest.mark.parametrize(("new", "fits"), [(8, True), (9, False)])
def test_a_prompt_beyond_the_assistants_positions(engine, monkeypatch, new, fits):
    short = eager(tiny_model(max_position_embeddings=N + 7))
    if fits:
        want = engine.generate(CHUNKS, QUESTION, max_new_tokens=new, eos_token_id=None).token_ids
        got = engine.generate(CHUNKS, QUESTION, max_new_tokens=new, eos_token_id=None, assistant_model=short)
        assert got.token_ids == want
        return
    monkeypatch.setattr("ragkv.prompting.fuse", lambda *_: pytest.fail("the prompt was computed"))
    with pytest.raises(PromptTooLongError, match=f"{N} tokens and 9 of an answer.*assistant_model's {N + 7} positions"):
        engine.generate(CHUNKS, QUESTION, max_new_tokens=new, assistant_model=short)

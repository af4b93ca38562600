"""Every argument of ``model.generate`` does what it does there, or is refused by name before anything is computed."""

import inspect
from fractions import Fraction
from time import perf_counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

from ragkv import (
    ArgumentError,
    ArgumentTypeError,
    Engine,
    FullPrefill,
    MethodError,
    PromptTooLongError,
    RagKVError,
    Reuse,
    UnknownArgumentError,
)
from ragkv.model.arguments import BESIDE, HONOURED, REFUSED
from ragkv.model.generation import Settings
from ragkv.prompting import Prompting
from ragkv.testing import random_ids, tiny_model

from .conftest import QUESTION, TEMPLATE

FIELDS = {name for name in vars(GenerationConfig()) if name[0] != "_"}
PARAMETERS = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
CHUNKS = [random_ids(40), random_ids(50)]
N = 3 + 41 + 51 + 6  # tokens of the prompt
SAMPLED = {"do_sample": True, "temperature": 2.0, "top_k": 0}
BEAMS = {"num_beams": 3}


LETTERS = [chr(i) if 32 <= i < 127 else chr(0x100 + i) for i in range(128)]


def letters():
    """One letter a token."""
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


class Ban(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores[:, ::2] = -torch.inf  # in place, as processors may
        return scores


class Stop(StoppingCriteria):
    def __call__(self, input_ids, scores, **rest):
        return torch.tensor([input_ids.shape[1] >= N + 3] * len(input_ids))


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def engine(model):
    return Engine(model, template=TEMPLATE, method=FullPrefill())


def wanted(model, **arguments):
    prompt = torch.tensor([[*TEMPLATE.prefix, *CHUNKS[0], 10, *CHUNKS[1], 10, *QUESTION]])
    torch.manual_seed(0)
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)[0, N:].tolist()


def got(engine, **arguments):
    torch.manual_seed(0)
    return list(engine.generate(CHUNKS, QUESTION, **arguments).token_ids)


@pytest.fixture(scope="module")
def plain(model):
    """What the model says by itself."""
    return wanted(model, max_new_tokens=8)


def examples(plain):
    """Each honoured argument, at a value that shows in the answer; with what it needs besides."""
    first, third = plain[0], plain[2]
    return {
        "max_length": {"max_length": N + 5, "max_new_tokens": None},
        "max_new_tokens": {"max_new_tokens": 5},
        "min_length": {"eos_token_id": first, "min_length": N + 4},
        "min_new_tokens": {"eos_token_id": first, "min_new_tokens": 4},
        "max_time": {"max_time": 1e-9},
        "stop_strings": {"stop_strings": [LETTERS[third]], "tokenizer": letters()},
        "do_sample": {"do_sample": True},
        "temperature": {"do_sample": True, "temperature": 3.0},
        "top_k": {**SAMPLED, "top_k": 2},
        "top_p": {**SAMPLED, "top_p": 0.3},
        "min_p": {**SAMPLED, "min_p": 0.4},
        "top_h": {**SAMPLED, "top_h": 0.3},
        "typical_p": {**SAMPLED, "typical_p": 0.3},
        "epsilon_cutoff": {**SAMPLED, "temperature": 4.0, "epsilon_cutoff": 0.01},
        "eta_cutoff": {**SAMPLED, "eta_cutoff": 0.3},
        "renormalize_logits": {"renormalize_logits": True},
        "num_beams": BEAMS,
        "early_stopping": {**BEAMS, "eos_token_id": third, "early_stopping": True},
        "length_penalty": {**BEAMS, "eos_token_id": third, "length_penalty": -5.0},
        "guidance_scale": {"guidance_scale": 3.0},
        "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=20.0)},
        "remove_invalid_values": {"remove_invalid_values": True},
        "repetition_penalty": {"repetition_penalty": 3.0},
        "encoder_repetition_penalty": {"encoder_repetition_penalty": 0.2},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
        "bad_words_ids": {"bad_words_ids": [[first]]},
        "suppress_tokens": {"suppress_tokens": [first]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [first]},
        "sequence_bias": {"sequence_bias": {(7,): 100.0}},
        "exponential_decay_length_penalty": {"eos_token_id": 9, "exponential_decay_length_penalty": (2, 50.0)},
        "forced_bos_token_id": {"forced_bos_token_id": 9},
        "forced_eos_token_id": {"forced_eos_token_id": 9},
        "pad_token_id": {"pad_token_id": 5},
        "bos_token_id": {"bos_token_id": 5},
        "eos_token_id": {"eos_token_id": third},
        "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
        "max_matching_ngram_size": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
        "disable_compile": {"disable_compile": True},
        "transformers_version": {"transformers_version": "1"},
        "generation_config": {"generation_config": GenerationConfig(repetition_penalty=3.0)},
        "logits_processor": {"logits_processor": LogitsProcessorList([Ban()])},
        "stopping_criteria": {"stopping_criteria": [Stop()]},
        "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda batch, ids: [len(ids) % 100, 7]},
        "streamer": {"streamer": None},
        "tokenizer": {"stop_strings": LETTERS[third], "tokenizer": letters()},
        "negative_prompt_ids": {"guidance_scale": 3.0, "negative_prompt_ids": torch.tensor([[4, 5, 6]])},
        "negative_prompt_attention_mask": {
            "guidance_scale": 3.0,
            "negative_prompt_ids": torch.tensor([[4, 5, 6]]),
            "negative_prompt_attention_mask": torch.tensor([[0, 1, 1]]),
        },
        "assistant_model": {"assistant_model": tiny_model()},
    }


# A greedy answer does not show these.
UNSEEN = {"renormalize_logits", "remove_invalid_values", "pad_token_id", "bos_token_id", "disable_compile", "streamer"}
UNSEEN |= {
    "transformers_version",
    "forced_bos_token_id",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "assistant_model",
}


def test_every_argument_of_transformers_has_its_place():
    assert HONOURED | REFUSED.keys() >= FIELDS
    assert BESIDE | REFUSED.keys() >= PARAMETERS
    assert not (HONOURED | BESIDE) & REFUSED.keys()
    assert HONOURED <= FIELDS


@pytest.mark.parametrize("name", sorted(HONOURED | BESIDE))
def test_honoured(engine, model, plain, name):
    arguments = {"max_new_tokens": 8, **examples(plain)[name]}
    arguments = {key: value for key, value in arguments.items() if value is not None}
    assert name in arguments or name == "streamer"
    want = wanted(model, **arguments)
    assert got(engine, **arguments) == want
    assert (want == plain) == (name in UNSEEN)


@pytest.mark.parametrize(
    "name", ["repetition_penalty", "eos_token_id", "forced_eos_token_id", "prefix_allowed_tokens_fn"]
)
def test_honoured_by_beams(engine, model, plain, name):
    arguments = {"max_new_tokens": 8, **BEAMS, **examples(plain)[name]}
    assert got(engine, **arguments) == wanted(model, **arguments) != wanted(model, max_new_tokens=8, **BEAMS)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_before_anything_is_computed(engine, monkeypatch, name):
    monkeypatch.setattr(Prompting, "prompt", lambda *_: pytest.fail("the prompt was made"))
    value = {"use_cache": False, "num_return_sequences": 2}.get(name, object())
    for ask in (engine.generate, Engine(engine.model, letters(), template=TEMPLATE, method=Reuse()).stream):
        with pytest.raises(ArgumentError, match=rf"^{name}=.*: .+"):
            ask(CHUNKS, QUESTION, **{name: value})


def test_values_that_ask_for_nothing(engine, plain):
    nothing = {"use_cache": True, "num_return_sequences": 1, "output_scores": False, "assistant_model": None}
    defaults = GenerationConfig(**GenerationConfig._get_default_generation_params())
    assert got(engine, max_new_tokens=8, **nothing) == plain
    assert got(engine, max_new_tokens=8, generation_config=defaults) == plain


def test_a_refused_argument_in_a_generation_config(engine):
    with pytest.raises(ArgumentError, match=r"^penalty_alpha=0\.6: "):
        got(engine, generation_config=GenerationConfig(penalty_alpha=0.6))


def test_a_field_of_a_later_transformers_is_refused(engine, monkeypatch):
    make = GenerationConfig.__init__

    def later(self, **rest):
        make(self, **rest)
        self.brand_new = rest.get("brand_new")

    monkeypatch.setattr(GenerationConfig, "__init__", later)
    with pytest.raises(ArgumentError, match="brand_new=1: this version of ragkv does not know it"):
        got(engine, brand_new=1)


@pytest.mark.parametrize(
    ("name", "near"),
    [("max_new_token", "max_new_tokens"), ("temprature", "temperature"), ("deadline", "deadline_s"), ("zzz", "")],
)
def test_unknown_names(engine, name, near):
    for value in (1, None):
        with pytest.raises(UnknownArgumentError, match=f"no generation argument {name}.*{near}") as raised:
            got(engine, **{name: value})
        assert isinstance(raised.value, TypeError)


def test_arguments_of_the_forward_are_refused(engine):
    with pytest.raises(ArgumentError, match="logits_to_keep=3: the engine makes the prompt"):
        got(engine, logits_to_keep=3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": -1.0, "do_sample": True},
        {"top_p": -1.0, "do_sample": True},
        {"stop_strings": ["x"]},
        {"early_stopping": "maybe"},
        {"logits_processor": Ban()},
        {"stopping_criteria": Stop()},
        {"generation_config": {"max_new_tokens": 3}},
        {"max_new_tokens": 0},
        {"max_length": 0},
        {"max_matching_ngram_size": 0},
        {"num_beams": 2, "streamer": BaseStreamer()},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_wrong_values_are_refused_before_anything_is_computed(engine, monkeypatch, arguments):
    monkeypatch.setattr(Prompting, "prompt", lambda *_: pytest.fail("the prompt was made"))
    with pytest.raises(ArgumentError, match=next(iter(arguments)).removesuffix("s").replace("_", ".")):
        got(engine, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"logits_processor": [5]},
        {"stopping_criteria": [5]},
        {"prefix_allowed_tokens_fn": 5},
        {"streamer": 5},
        {"negative_prompt_ids": [1, 2]},
        {"negative_prompt_attention_mask": [1, 1]},
        {"num_beams": "2"},
        {"num_beams": 2.5},
        {"num_beams": 0},
        {"max_time": "2"},
        {"max_time": True},
        {"past": 5},
        {"keep_past": "no"},
        {"priority": True},
        {"deadline_s": True},
    ],
    ids=str,
)
def test_wrong_types_are_refused_before_anything_is_computed(engine, monkeypatch, arguments):
    monkeypatch.setattr(Prompting, "prompt", lambda *_: pytest.fail("the prompt was made"))
    with pytest.raises(RagKVError, match=rf"{next(iter(arguments))} must be "):
        got(engine, **arguments)


@pytest.mark.parametrize(
    "processor", [lambda ids, scores: None, lambda ids, scores: scores[:, 1:]], ids=["none", "few"]
)
def test_what_a_processor_gives_is_looked_at(engine, processor):
    with pytest.raises(
        ArgumentTypeError, match=r"logits_processor must give scores \[1, \d+\], as it takes them, got "
    ):
        got(engine, logits_processor=[processor])


def test_max_length_counts_the_prompt(engine):
    with pytest.raises(PromptTooLongError, match=f"max_length={N} counts the prompt, which has {N} tokens"):
        got(engine, max_length=N)
    with pytest.raises(PromptTooLongError, match="2048 positions"):
        got(engine, max_length=3000)


def test_beams_are_refused_by_streams_at_the_call(model):
    engine = Engine(model, letters(), template=TEMPLATE, method=Reuse())
    with pytest.raises(ArgumentError, match="num_beams"):
        engine.stream(CHUNKS, QUESTION, num_beams=2)


class Heard(BaseStreamer):
    def __init__(self):
        self.said = []

    def put(self, value):
        self.said.append(value.tolist())

    def end(self):
        self.said.append("end")


def test_a_streamer_hears_what_it_hears_from_transformers(engine, model):
    heard, want = Heard(), Heard()
    wanted(model, max_new_tokens=4, streamer=want)
    got(engine, max_new_tokens=4, streamer=heard)
    assert heard.said == want.said
    assert len(heard.said) == 6


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 3.0},
        {"do_sample": True, "temperature": 2.0, "top_k": 20, "top_p": 0.8},
        {"num_beams": 3},
        {"eos_token_id": [9, 11], "forced_eos_token_id": 11, "max_new_tokens": 5},
        {"max_length": N + 5},
        {"use_cache": False, "return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 4},
        {"num_beams": 2, "return_dict_in_generate": True, "max_new_tokens": 4},
    ],
    ids=lambda own: next(iter(own)),
)
def test_the_models_own_generation_config_holds(own):
    model = tiny_model()
    model.generation_config = GenerationConfig(**{"eos_token_id": None, **own})
    said = {} if {"max_new_tokens", "max_length"} & own.keys() else {"max_new_tokens": 8}
    engine = Engine(model, template=TEMPLATE, method=FullPrefill())
    answer = got(engine, **said)
    assert answer == wanted(model, **said, return_dict_in_generate=False)
    model.generation_config = GenerationConfig(eos_token_id=None)
    assert got(engine, **said) != answer


def test_the_models_own_strategy_is_refused_where_it_cannot_be_honoured():
    model = tiny_model()
    model.generation_config.penalty_alpha = 0.6
    with pytest.raises(ArgumentError, match=r"penalty_alpha \(the model's generation config sets it\)"):
        got(Engine(model, template=TEMPLATE), max_new_tokens=3)


def test_methods_by_name(model):
    engine = Engine(model, template=TEMPLATE, method="full-prefill")
    assert engine.method == FullPrefill()
    chunks = engine.add(CHUNKS)
    for ask in (engine.fuse, engine.generate):
        answer = ask(chunks, QUESTION, method="reuse")
        report = answer.report if ask == engine.fuse else answer.report.fusion
        assert report.method == repr(Reuse())
        with pytest.raises(MethodError, match=r"no method 'reuze'; there are: auto.*reuse"):
            ask(chunks, QUESTION, method="reuze")
    with pytest.raises(MethodError, match="no method 'reuze'"):
        Engine(model, letters(), template=TEMPLATE, method="reuse").stream(chunks, QUESTION, method="reuze")
    with pytest.raises(TypeError, match=r"ragkv\.Method"):
        engine.fuse(chunks, QUESTION, method=7)


def test_time_counts_from_the_question_with_beams_too(model):
    settings = Settings(Engine(model, template=TEMPLATE).decoder, None, {"num_beams": 2, "max_time": Fraction(60)})
    assert settings.for_generate(N, perf_counter() - 50)["max_time"] < 11

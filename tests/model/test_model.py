"""What is accepted, what is refused by name, and that rope kinds and attention kinds keep their exactness."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import ragkv
from ragkv import CacheBlend, Engine, LegoLink, PromptTemplate, Reuse, UnsupportedModelError
from ragkv.model.activations import _inner
from ragkv.model.decoder import Decoder
from ragkv.model.inspection import refuse_by_config
from ragkv.testing import as_cache, random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5])
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
        "rope_theta": 500000.0,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "rope_theta": 10000.0,
    },
}


def exactness(engine, method, chunks, question):
    prompt = engine.fuse(chunks, question, method=method)
    with torch.no_grad():
        want = engine.model(input_ids=prompt.input_ids, **as_cache(DynamicCache())).logits[:, -1]
    return float((prompt.logits - want).abs().max())


def layer_zero_error(engine, chunks, question):
    prompt = engine.fuse(chunks, question, method=Reuse())
    cache = DynamicCache()
    with torch.no_grad():
        engine.model(input_ids=prompt.input_ids, **as_cache(cache))
    return float((prompt.past_key_values.layers[0].keys - cache.layers[0].keys).abs().max())


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "cohere"])
def test_rope_kinds(architecture, kind):
    engine = Engine(tiny_model(architecture, rope_parameters=ROPES[kind]), template=TEMPLATE)
    lone = engine.add([random_ids(30), random_ids(600), random_ids(50)])
    assert exactness(engine, LegoLink(k=1000), lone[::-1], random_ids(7)) < 1e-4
    assert layer_zero_error(engine, lone[::-1], random_ids(7)) < 2e-5


def test_keys_stay_right_far_out():
    """At position 100,000 fp32 angles are off by 5e-3; the rotation is off by no more than fp32 rounding of the keys."""
    engine = Engine(tiny_model(max_position_embeddings=131072), template=TEMPLATE)
    from ragkv.model.rope import turned

    start, far = engine.decoder._run_at(0), engine.decoder._run_at(100_003)
    moved = turned(start.keys[0], engine.decoder.rotations[0], 0, 100_003)
    assert float((moved - far.keys[0]).abs().max()) < 2e-5


@pytest.mark.parametrize(
    "attention",
    ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.long)],  # compiles for a minute
)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text"])
def test_attention_kinds(architecture, attention):
    model = tiny_model(architecture, attn_implementation=attention)
    with torch.no_grad():
        if not model(input_ids=torch.tensor([random_ids(24)])).logits.isfinite().all():
            pytest.skip(f"transformers' own {attention} gives NaN here")
    engine = Engine(model, template=TEMPLATE)
    lone = engine.add([random_ids(30), random_ids(40)])
    for method in (LegoLink(k=1000), CacheBlend(ratio=1.0)):
        assert exactness(engine, method, lone[::-1], random_ids(7)) < 1e-4
    report = engine.fuse(lone, random_ids(7), method=CacheBlend(ratio=0.5)).report
    assert report.attention == ("eager" if attention == "flex_attention" else attention)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    engine = Engine(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), template=TEMPLATE)
    lone = engine.add([random_ids(30), random_ids(40)])
    prompt = engine.fuse(lone[::-1], random_ids(7), method=LegoLink(k=1000))
    assert prompt.past_key_values.layers[0].keys.dtype == dtype
    oracle = tiny_model()
    with torch.no_grad():
        want = oracle(input_ids=prompt.input_ids).logits[:, -1]
        eager = engine.model(input_ids=prompt.input_ids).logits[:, -1]
    noise = float((eager - want).abs().max())  # what the precision itself costs
    assert float((prompt.logits - want).abs().max()) < 2 * noise + 1e-3


REFUSED = {
    "gpt2": ("values change with the absolute position", {"n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "opt": ("values change with the absolute position", {"ffn_dim": 64, "word_embed_proj_dim": 64}),
    "xlm": (
        "it did not compute the tokens|nothing to reuse",
        {"emb_dim": 64, "n_layers": 2, "n_heads": 4, "attn_implementation": "eager"},
    ),
    "mamba": ("linear_attention", {"state_size": 8, "attn_implementation": "eager"}),
    "qwen3_next": ("linear_attention", {"num_experts": 4, "moe_intermediate_size": 32}),
    "bloom": ("ALiBi|plain key-value cache", {"n_layer": 2, "n_head": 4, "attn_implementation": "eager"}),
    "falcon": ("ALiBi", {"alibi": True, "head_dim": None, "new_decoder_architecture": False}),
    "openai-gpt": ("nothing to reuse", {"n_positions": 512, "n_embd": 64, "attn_implementation": "eager"}),
    "gemma3n_text": (
        "layers 5 of the model's 6 keep no keys and values of their own",
        {
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 1,
            "vocab_size_per_layer_input": 128,
            "intermediate_size": 96,
            "layer_types": None,
        },
    ),
    "hrm_text": ("does not keep its decoder layers in one list", {"attn_implementation": "eager"}),
    "deepseek_v3": ("MLA", {"kv_lora_rank": 16, "q_lora_rank": 16, "moe_intermediate_size": 32}),
    "llama": (
        "rope type 'dynamic'",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "phi3": (
        "rope type 'longrope'",
        {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 2048,
            },
        },
    ),
}


@pytest.mark.parametrize("architecture", REFUSED)
def test_refused_by_name(architecture):
    reason, settings = REFUSED[architecture]
    model = tiny_model(architecture, **settings)
    with pytest.raises(UnsupportedModelError, match=reason):
        Engine(model)


def test_layers_that_differ():
    """In transformers such a config raises when it is asked for the setting of all."""
    wide = AutoConfig.for_model("llama", num_hidden_layers=2, per_layer_config={1: {"intermediate_size": 16000}})
    refuse_by_config(wide)
    assert _inner(wide) == 16000
    with pytest.raises(UnsupportedModelError, match="differ in their sliding_window"):
        refuse_by_config(AutoConfig.for_model("mistral", per_layer_config={1: {"sliding_window": 8}}))
    latent = AutoConfig.for_model("deepseek_v3", per_layer_config={1: {"kv_lora_rank": 8}})
    with pytest.raises(UnsupportedModelError, match="MLA"):
        refuse_by_config(latent)


def test_refuses_encoder_decoders():
    config = AutoConfig.for_model("t5", d_model=32, d_ff=32, num_layers=2, num_heads=2, vocab_size=128, d_kv=16)
    from transformers import T5ForConditionalGeneration

    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        Engine(T5ForConditionalGeneration(config).eval())


def test_refuses_frequencies_in_half_precision():
    model = copy.deepcopy(tiny_model()).to(torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match=r"from_pretrained\(\.\.\., dtype="):
        Engine(model)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_refuses_what_no_store_takes(architecture):
    with pytest.raises(UnsupportedModelError, match="float64"):
        Engine(tiny_model(architecture).double(), template=TEMPLATE)


def test_refuses_training_mode():
    model = copy.deepcopy(tiny_model()).train()
    with pytest.raises(UnsupportedModelError, match=r"model\.eval\(\)"):
        Engine(model)


def never(graph, inputs):
    raise AssertionError("it was compiled")


def test_a_compiled_model_is_driven_uncompiled():
    model = tiny_model()
    engine = Engine(torch.compile(model, backend=never), template=TEMPLATE, method=Reuse())
    answer = engine.generate([random_ids(9)], random_ids(7), max_new_tokens=3)
    assert len(answer.token_ids) == 3
    assert engine.documents.space == Engine(model, template=TEMPLATE, method=Reuse()).documents.space


def compile_forward(model):
    model.forward = torch.compile(model.forward, backend=never)


def compile_inside(model):
    model.model = torch.compile(model.model, backend=never)


IN_PLACE = {
    "model.compile()": lambda model: model.compile(backend=never),
    "layer.compile()": lambda model: model.model.layers[1].compile(backend=never),
    "model.forward": compile_forward,
    "a part": compile_inside,
}


@pytest.mark.parametrize("way", IN_PLACE)
def test_a_model_compiled_in_place_is_refused(way):
    model = tiny_model()
    IN_PLACE[way](model)
    with pytest.raises(UnsupportedModelError, match="compiled in place"):
        Engine(model)


def test_a_model_compiled_in_place_later_is_refused():
    model = tiny_model()
    engine = Engine(model, template=TEMPLATE, method=Reuse())
    model.compile(backend=never)
    with pytest.raises(UnsupportedModelError, match="compiled in place"):
        engine.fuse([random_ids(9)], random_ids(7))


def test_wrong_rope_is_found_out():
    """A model whose keys turn by other frequencies than it shows is refused, not served."""
    model = copy.deepcopy(tiny_model())
    rotary = model.model.rotary_emb
    original = type(rotary).forward

    class Other(type(rotary)):
        def forward(self, x, position_ids):
            return original(self, x, position_ids * 3)

    rotary.__class__ = Other
    with pytest.raises(UnsupportedModelError, match="no known rotation"):
        Decoder(model)


def test_positions_within_which_keys_move():
    """Llama 4 scales its queries by the absolute position; beyond that point moved keys would not be its own."""
    model = tiny_model(
        "llama4_text", floor_scale=4096, max_position_embeddings=16384, attn_scale=0.5, attn_temperature_tuning=True
    )
    decoder = Decoder(model)
    assert 3900 < decoder.max_positions < 4200


def test_the_space_tells_models_apart():
    one, two = tiny_model(), copy.deepcopy(tiny_model())
    assert Engine(one).documents.space == Engine(two).documents.space
    with torch.no_grad():
        two.model.layers[3].mlp.down_proj.weight[5, 7] += 1e-3
    spaces = {Engine(one).documents.space, Engine(two).documents.space, Engine(one, template=TEMPLATE).documents.space}
    spaces.add(Engine(tiny_model(attn_implementation="eager")).documents.space)
    spaces.add(Engine(tiny_model(rope_parameters=ROPES["linear"])).documents.space)
    assert len(spaces) == 5
    assert Engine(one, template=PromptTemplate(prefix=[1, 5], after_chunk=[7])).documents.space in spaces


def test_nothing_hangs_on_names():
    for architecture in ("arcee", "seed_oss", "helium", "olmo", "olmoe", "apertus", "persimmon", "nanochat"):
        engine = Engine(tiny_model(architecture), template=TEMPLATE)
        lone = engine.add([random_ids(30), random_ids(40)])
        assert exactness(engine, LegoLink(k=1000), lone[::-1], random_ids(7)) < 1e-4, architecture


def test_version():
    assert ragkv.__version__

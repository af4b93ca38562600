"""How many tokens one forward takes, by what is free: on numbers."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from ragkv import Engine, PromptTemplate, TieredStore
from ragkv.errors import ArgumentError
from ragkv.library import documents as reading
from ragkv.model.activations import piece_tokens, seen_bytes, token_bytes
from ragkv.model.cache import LayerSpec
from ragkv.testing import ARCHITECTURES, SMALL, random_ids, tiny_model

GPU, GIB = torch.device("cuda"), 1 << 30


def decoder(positions=131072, attention="sdpa", device=GPU, **more):
    """As one of 8 billion parameters in bf16 says of itself."""
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
    config, dtype = LlamaConfig(**{**sizes, **more}), torch.bfloat16
    specs = [LayerSpec(config.num_key_value_heads, 128, 128, dtype, device)] * 32
    return SimpleNamespace(
        config=config, specs=specs, dtype=dtype, device=device, max_positions=positions, attention=attention
    )


def test_what_a_token_takes():
    one = decoder()
    residual, queries, stored, inner, mask = 4096 * 10, 3 * 4096 * 2, 2 * 8 * 256 * 2, 3 * 14336 * 2, 32768 * 3
    assert token_bytes(one) == residual + queries + stored + inner + mask
    assert seen_bytes(one) == 32768 * 32 * 256 * 2
    assert token_bytes(decoder(positions=2048)) == token_bytes(one) - 3 * (32768 - 2048)
    assert token_bytes(decoder(positions=None)) == token_bytes(one)
    assert token_bytes(decoder(attention="eager")) == token_bytes(one) + 32 * 32768 * 6
    assert token_bytes(decoder(intermediate_size=28672)) == token_bytes(one) + inner


@pytest.mark.parametrize(
    ("free", "want"),
    [
        (100 * GIB, 8192),
        (16 * GIB, 8192),
        (8 * GIB, 4096),
        (5 * GIB, 2048),
        (2 * GIB, 512),
        (0, 512),
        (-GIB, 512),
    ],
)
def test_what_fits(free, want):
    assert piece_tokens(decoder(), free) == want


def test_larger_models_and_eager_ones_take_fewer():
    assert piece_tokens(decoder(attention="eager"), 16 * GIB) == 512
    assert piece_tokens(decoder(hidden_size=8192, num_attention_heads=64, intermediate_size=28672), 16 * GIB) == 4096
    assert piece_tokens(decoder(device=torch.device("cpu")), 100 * GIB) == 512


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_says_its_widths(architecture):
    settings = {**SMALL, **ARCHITECTURES[architecture]}
    del settings["attn_implementation"]
    one = decoder()
    one.config = AutoConfig.for_model(architecture, **{k: v for k, v in settings.items() if v is not None})
    assert token_bytes(one) > 10 * one.config.hidden_size


def test_an_engine_asks_its_device(monkeypatch):
    model, asked, left = tiny_model(), [], {"cpu": 10 << 20}
    monkeypatch.setattr(reading, "affordable", lambda decoder, free: (asked.append(free), 1024)[1])
    monkeypatch.setattr(reading, "free_bytes", lambda device: left[device.type])
    store = TieredStore(gpu_bytes=1 << 20, device="cpu")
    with Engine(model, template=PromptTemplate(prefix=[1]), store=store) as engine:
        assert engine.piece_tokens == engine.documents.reader.piece_tokens == 1024
        chunks = engine.add([random_ids(5)])
        engine.fuse(chunks, random_ids(3))  # the pool is allocated
        assert Engine(model, store=store, template=PromptTemplate(prefix=[1])).piece_tokens == 1024
        specs = engine.decoder.specs  # a model in parts: the fullest counts, and one of which nothing is known is full
        specs[1] = specs[1]._replace(device=torch.device("meta"))
        for left["meta"] in (5 << 20, None):
            Engine(model, store=store, template=PromptTemplate(prefix=[1]))
    assert asked == [9 << 20, 10 << 20, 5 << 20, 0]
    assert Engine(tiny_model(), piece_tokens=64).piece_tokens == 64 and len(asked) == 4
    with pytest.raises(ArgumentError, match="piece_tokens"):
        Engine(model, piece_tokens=0)


def test_a_cpu_takes_512():
    assert Engine(tiny_model()).piece_tokens == 512

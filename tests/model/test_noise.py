"""Models with noise of their own are driven, and what is wrong is found out all the same; NaN is refused by name."""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ragkv import Engine, LegoLink, PromptTemplate, Reuse, UnsupportedModelError
from ragkv.model.decoder import Decoder
from ragkv.testing import random_ids, tiny_model

ABSOLUTE = {
    "gpt2": {"n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64},
}


def coarse(x):
    """As linear layers that compute in bfloat16 in a model of fp32, which 4-bit weights of bitsandbytes do."""
    return x.bfloat16().to(x.dtype)


def per_tensor(x):
    """Rounded to 8 bits, by a scale that hangs on all tokens of the pass."""
    scale = x.abs().max().clamp_min(1e-9) / 127
    return (x / scale).round() * scale


def rounding(rounded):
    def change(model):
        model = copy.deepcopy(model)
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D):
                module.register_forward_pre_hook(lambda module, args: (rounded(args[0]),))
        return model

    return change


def int8(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and the only one that PyTorch itself ships
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})


NOISY = {"coarse": rounding(coarse), "per tensor": rounding(per_tensor), "int8": int8}


@pytest.mark.parametrize("kind", NOISY)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "phi", "gpt_neox"])
def test_noisy_models_are_driven(architecture, kind):
    engine = Engine(NOISY[kind](tiny_model(architecture)), template=PromptTemplate(prefix=[1, 5]), method=Reuse())
    chunks = engine.add([random_ids(30), random_ids(40)])
    prompt = engine.fuse(chunks[::-1], random_ids(7), method=LegoLink(k=1000))
    with torch.no_grad():
        want = engine.model(prompt.input_ids).logits[:, -1]
    assert float((prompt.logits - want).norm() / want.norm()) < 0.3
    assert len(engine.generate(chunks, random_ids(7), max_new_tokens=3, eos_token_id=None).token_ids) == 3


@pytest.mark.parametrize("kind", NOISY)
@pytest.mark.parametrize("architecture", ABSOLUTE)
def test_learned_positions_are_refused_in_noise_too(architecture, kind):
    model = NOISY[kind](tiny_model(architecture, **ABSOLUTE[architecture]))
    with pytest.raises(UnsupportedModelError, match="learned or absolute position embeddings"):
        Decoder(model)


def test_no_noise_is_so_great_that_anything_passes(monkeypatch):
    monkeypatch.setattr(Decoder, "_noise", lambda decoder: 5.0)
    with pytest.raises(UnsupportedModelError, match="absolute position"):
        Decoder(tiny_model("gpt2", **ABSOLUTE["gpt2"]))


def test_an_exact_model_is_not_measured(monkeypatch):
    monkeypatch.setattr(Decoder, "_noise", None)
    assert Decoder(tiny_model()).rotations


@pytest.mark.parametrize("kind", ["exact", "int8"])
def test_a_small_mistake_of_an_exact_model_is_no_noise(kind):
    """Keys that turn a little faster than the model shows: 0.3 % further out, which is far below int8's noise."""
    model = copy.deepcopy(tiny_model())
    original = type(model.model.rotary_emb).forward

    class Faster(type(model.model.rotary_emb)):
        def forward(self, x, position_ids):
            return original(self, x, position_ids * (1 + 1e-5))

    model.model.rotary_emb.__class__ = Faster
    if kind == "int8":
        assert Decoder(int8(model)).rotations
    else:
        with pytest.raises(UnsupportedModelError, match=r"no known rotation|values change"):
            Decoder(model)


def test_no_trace_of_measuring():
    model = tiny_model()
    decoder = Decoder(model)
    noise = decoder._noise()
    assert 0 < noise < 1e-3
    assert not any(module._forward_hooks for module in model.modules())


def test_quantised_weights_tell_models_apart():
    one, other = tiny_model(), tiny_model()
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight[3, 4] += 1.0
    spaces = [Engine(int8(model), method=Reuse()).documents.space for model in (one, copy.deepcopy(one), other)]
    assert spaces[0] == spaces[1] != spaces[2]


@pytest.mark.parametrize("part", ["lm_head", "model.layers.1.mlp.down_proj"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_model_that_overflows_is_refused_with_the_dtype_to_take(part, dtype, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.get_submodule(part).weight *= 1e6 if dtype == torch.float16 else 1e39
        model.lm_head.weight[:] = model.lm_head.weight.clamp(-6e4, 6e4)
        if part != "lm_head":
            model.get_submodule(part).weight[:] = model.get_submodule(part).weight.clamp(-6e4, 6e4)
    if dtype == torch.float32:
        model.get_submodule(part).register_forward_hook(lambda module, args, out: out * torch.inf)
    else:
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    named = "bfloat16 or dtype=torch.float32" if dtype == torch.float16 else "its weights hold NaN"
    with pytest.raises(UnsupportedModelError, match=f"NaN or infinite.*{named}"):
        Decoder(model)

"""Packed weights: near the model's own, as exact as any other model, and a space of their own."""

import pytest
import torch
from torch import nn

from ragkv import RAG, ArgumentError, Engine, LegoLink, PromptTemplate, Reuse, UnsupportedModelError
from ragkv.model.loading import load_model
from ragkv.model.packed import Float16Linear, Int8Linear, pack
from ragkv.model.runner import Runner
from ragkv.testing import random_ids, tiny_model
from tests.rag.rags import WordEmbedder

KINDS = {"float16": (Float16Linear, 1e-3), "int8": (Int8Linear, 2e-2)}

pytestmark = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="FBGEMM is not in this PyTorch"
)


def relative(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (7, 5), (1, 3)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer(kind, inputs, outputs, bias):
    make, tolerance = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight[0] = 0  # a row without a scale
    added = torch.randn(outputs, generator=generator) if bias else None
    rows = torch.randn(2, 3, inputs, generator=generator)
    rows[0, 0, 0] = 1000  # an outlier leaves the others' numbers alone
    rows[1, 1] = 0
    layer = make(weight, added)
    got, want = layer(rows), nn.functional.linear(rows, weight, added)
    assert got.shape == want.shape and got.dtype == torch.float32
    assert relative(got[0, 1:], want[0, 1:]) < tolerance and relative(got[1, 2], want[1, 2]) < tolerance
    torch.testing.assert_close(got[1, 1], torch.zeros(outputs) if added is None else added, atol=0, rtol=0)
    if kind == "int8":
        assert torch.equal(layer(rows[1:, 2:])[0, 0], got[1, 2]), "a token is the same alone and among others"


def test_eight_bits_are_multiplied_to_thirteen():
    """What int8 loses is the weights' rounding; with that taken out, little is left."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(48, 256, generator=generator)
    scales = weight.abs().amax(1, keepdim=True) / 127
    rounded = (weight / scales).round() * scales
    rows = torch.randn(9, 256, generator=generator)
    assert relative(Int8Linear(weight, None)(rows), rows @ rounded.T) < 5e-4
    extreme = Int8Linear(torch.full((1, 512), 3.0), None)(torch.full((1, 512), -5.0))
    torch.testing.assert_close(extreme, torch.full((1, 1), -15.0 * 512), rtol=1e-5, atol=0)  # no sum overflows


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_layers_that_read_the_same_tensor_see_what_is_written_to_it(mode):
    generator = torch.Generator().manual_seed(2)
    one, other = (Int8Linear(torch.randn(8, 16, generator=generator), None) for _ in range(2))
    with mode():
        rows = torch.randn(2, 3, 16, generator=generator)
        first, second = one(rows), other(rows)
        assert torch.equal(other(rows.clone()), second) and torch.equal(one(rows), first)
        rows.mul_(2)
        torch.testing.assert_close(other(rows), 2 * second)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_neox", "mixtral"])
def test_a_packed_model_is_exact(kind, architecture):
    own, chosen = tiny_model(architecture), torch.backends.quantized.engine
    packed = pack(tiny_model(architecture), kind)
    assert any(isinstance(module, KINDS[kind][0]) for module in packed.modules())
    assert torch.backends.quantized.engine == chosen
    engine = Engine(packed, template=PromptTemplate(prefix=[1, 5]), method=Reuse())
    chunks = engine.add([random_ids(30), random_ids(40)])
    prompt = engine.fuse(chunks[::-1], random_ids(7), method=LegoLink(k=1000))
    with torch.no_grad():
        want, plain = packed(prompt.input_ids).logits[:, -1], own(prompt.input_ids).logits[:, -1]
    assert relative(prompt.logits, want) < 2e-3
    assert 0 < relative(want, plain) < 0.3


def fingerprint(kind, change=lambda weight: weight):
    model = tiny_model()
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.copy_(change(weight))
    return Runner.of(model if kind is None else pack(model, kind)).fingerprint


def test_each_packing_is_a_space_of_its_own():
    assert len({fingerprint(kind) for kind in (None, *KINDS)}) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_packed_numbers_are_part_of_the_space(kind):
    """Of one layer too, and where its scale is all that differs."""
    changes = [lambda weight: weight.flip(0), lambda weight: weight * 2]
    own = fingerprint(kind)
    assert own == fingerprint(kind)
    assert len({own, *(fingerprint(kind, change) for change in changes)}) == 3


def test_a_folder_keeps_it(tmp_path):
    options = {"cpu_bytes": 1 << 26, "embedder": WordEmbedder()}
    with RAG.from_pretrained(path=tmp_path, weights="int8", **options) as rag:
        rag.add_texts(["Ida Voss built the harbour."], ["harbour"])
    with RAG.open(tmp_path, **options) as rag:
        model = rag.engine.model
        assert isinstance(model.get_output_embeddings(), Int8Linear) and model.dtype == torch.float32
        assert rag.refresh() == 0 and rag.ask("Who?", max_new_tokens=2).report.new_tokens


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"weights": "int3"}, "must be one of float16, int8, got 'int3'"),
        ({"weights": "int8", "device": "cuda"}, "leave out device"),
        ({"weights": "int8", "device_map": "auto"}, "leave out device and device_map"),
        ({"weights": "int8", "dtype": torch.bfloat16}, "computes in float32, got dtype=torch.bfloat16"),
        ({"weights": "int8", "quantization_config": object()}, "leave out quantization_config"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_loading(given, says):
    device = given.pop("device", None)
    with pytest.raises(ArgumentError, match=says):
        load_model("not/there", device, given)


def test_a_model_without_linear_layers():
    model = tiny_model()
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.Linear):
                setattr(module, name, nn.Identity())
    with pytest.raises(UnsupportedModelError, match="no linear layers"):
        pack(model, "int8")


def test_a_pytorch_without_the_kernels(monkeypatch):
    monkeypatch.setattr("ragkv.model.packed._ENGINE", "another")
    with pytest.raises(UnsupportedModelError, match="built for x86"):
        pack(tiny_model(), "int8")

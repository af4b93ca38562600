"""What was found of a model outlives the process, and holds for just that model: anything else is tried anew."""

import pytest
import torch

from ragkv import Engine, FullPrefill, PromptTemplate, Reuse, TieredStore
from ragkv.model import traits
from ragkv.model.decoder import Decoder
from ragkv.model.runner import Runner
from ragkv.model.traits import Traits, model_key
from ragkv.testing import random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6], anchor=[1, 7])
DOCUMENT, QUESTION = [random_ids(20), random_ids(15, 1)], random_ids(6, 2)
FAMILIES = ("llama", "qwen3", "gemma3_text", "cohere2", "gpt_neox", "phi3")


@pytest.fixture
def runs(monkeypatch):
    """Lists every pass of the model that is probing or reads what prompts begin with."""
    seen, trying, reading = [], Decoder._try, Decoder.read
    monkeypatch.setattr(Decoder, "_try", lambda decoder: (seen.append("try"), trying(decoder))[1])
    monkeypatch.setattr(Decoder, "read", lambda self, *args: (seen.append(args[0].tolist()), reading(self, *args))[1])
    return seen


def asked(model, path, runs, template=TEMPLATE, **options):
    """What was run to open a folder, and the logits of a question over the document in it."""
    with Engine(model, template=template, store=TieredStore(path, cpu_bytes=0, **options), sensitivity=False) as engine:
        opened = list(runs)
        chunks = engine.add_document(DOCUMENT)
        prompt = engine.fuse(chunks, QUESTION, method=Reuse())
        full = engine.fuse(chunks, QUESTION, method=FullPrefill())
    runs.clear()
    return opened, prompt.logits, full.logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_same_model_is_tried_once(kind, tmp_path, runs):
    opened, first, full = asked(tiny_model(kind), tmp_path, runs)
    assert "try" in opened and [1, 7] in opened and [1, 5, 6] in opened
    again, second, full_again = asked(tiny_model(kind), tmp_path, runs)
    assert again == []
    assert torch.equal(first, second) and torch.equal(full, full_again)


@pytest.mark.parametrize("kind", FAMILIES)
def test_traits_come_back_as_they_were(kind):
    model = tiny_model(kind)
    decoder = Decoder(model)
    known = Traits.from_bytes(decoder.traits.to_bytes(model), model)
    assert (known.specs, known.max_positions, known.spans) == (
        decoder.specs,
        decoder.max_positions,
        decoder.spans is not None,
    )
    for mine, own in zip(known.rotations, decoder.rotations, strict=True):
        assert (mine is None) == (own is None)
        assert own is None or (mine.interleaved == own.interleaved and torch.equal(mine.inv_freq, own.inv_freq))


def other_weights():
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[0] += 1
    return model


def own_forward():
    model = tiny_model()
    layer = model.model.layers[0]
    layer.forward = layer.forward
    return model


@pytest.mark.parametrize("change", [other_weights, own_forward, lambda: tiny_model(dtype=torch.bfloat16)])
def test_another_model_is_tried(change, tmp_path, runs):
    asked(tiny_model(), tmp_path, runs)
    assert "try" in asked(change(), tmp_path, runs)[0]
    assert asked(tiny_model(), tmp_path, runs)[0] == [], "both are kept"


def test_other_code_is_tried(tmp_path, runs, monkeypatch):
    asked(tiny_model(), tmp_path, runs)
    model = tiny_model()
    kind = type(model.model.layers[0].self_attn)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *args, **options: forward(*args, **options))
    assert "try" in asked(model, tmp_path, runs)[0]
    monkeypatch.setattr("torch.__version__", "0.0")
    assert "try" in asked(tiny_model(), tmp_path, runs)[0]


def test_all_that_runs_the_model_is_in_its_key(monkeypatch):
    """Traits hold for the kernels that were tried, on the devices where they were, by the versions that ran."""

    def key(kernels="auto", device="cpu"):
        return model_key(tiny_model().to(device), "weights", kernels)

    before = key()
    assert key() == before and len({before, key("reference"), key("triton"), key(device="meta")}) == 4
    for name in ("torch", "transformers"):
        with monkeypatch.context() as context:
            context.setattr(getattr(traits, name), "__version__", "0.0")
            assert key() != before, name
    monkeypatch.setattr(traits, "version", lambda name: "0.0")
    assert key() != before, "ragkv"


def test_prefix_that_changes_takes_the_place_of_the_one_before(tmp_path, runs, facts):
    asked(tiny_model(), tmp_path, runs)
    other = PromptTemplate(prefix=[1, 5, 8], anchor=[1, 7])
    for _ in range(3):
        assert asked(tiny_model(), tmp_path, runs, other)[0] in ([[1, 5, 8]], [])
    assert asked(tiny_model(), tmp_path, runs)[0] == [[1, 5, 6]]
    with TieredStore(tmp_path, cpu_bytes=0) as store:
        assert len([name for name in facts(store) if name.startswith(("prefix:", "anchor:", "model:"))]) == 3


@pytest.mark.parametrize("harm", ["cut", "emptied", "flipped", "swapped", "foreign"])
def test_damaged_ones_are_found_out_again(tmp_path, runs, facts, harm):
    opened, first, _ = asked(tiny_model(), tmp_path / "own", runs)
    asked(other_weights(), tmp_path / "other", runs)

    def kept(store):
        names = [name for name in sorted(facts(store)) if name.startswith(("prefix:", "anchor:", "model:"))]
        return {name: store.meta_get(name) for name in names}

    with TieredStore(tmp_path / "own", cpu_bytes=0) as store, TieredStore(tmp_path / "other", cpu_bytes=0) as other:
        own = kept(store)
        values = list(own.values())
        harmed = {
            "cut": [value[:-1] for value in values],
            "emptied": [b"" for _ in values],
            "flipped": [value[:-9] + bytes([value[-9] ^ 4]) + value[-8:] for value in values],
            "swapped": [*values[1:], values[0]],
            "foreign": list(kept(other).values()),
        }[harm]
        assert len(own) == len(harmed) == 3
        for name, value in zip(own, harmed, strict=True):
            store.meta_put(name, value)
    again, second, _ = asked(tiny_model(), tmp_path / "own", runs)
    assert again == opened and torch.equal(first, second)
    assert asked(tiny_model(), tmp_path / "own", runs)[0] == []


def test_folder_for_reading_only_keeps_nothing(tmp_path, runs):
    with TieredStore(tmp_path, cpu_bytes=0):
        pass
    with TieredStore(tmp_path, cpu_bytes=0, readonly=True) as store:
        assert Runner.of(tiny_model()).decoder("auto", store).rotations
    assert "try" in runs

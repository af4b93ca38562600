"""GGUF files: read as they are, exact at their own noise; what cannot be read is an error of ours."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ragkv import RAG, Engine, LegoLink, MissingPackageError, ModelNotFoundError, UnsupportedModelError
from ragkv.bundled import MODEL_PATH
from ragkv.model.loading import load_model
from ragkv.model.runner import Runner
from ragkv.testing import tiny_model
from tests.rag.rags import WordEmbedder

gguf = pytest.importorskip("gguf")

EIGHT_BITS = gguf.GGMLQuantizationType.Q8_0
TEXT, QUESTION = "The harbour of Tarn was built by Ida Voss.", "Who built it?"


def write(path, model):
    """A qwen2 of 8 bits, whose tokens are letters."""
    config, writer = model.config, gguf.GGUFWriter(path, "qwen2")
    letters = [chr(33 + i) for i in range(94)] + ["Ġ", "Ċ", "ab"]
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*letters, *(f"<|{i}|>" for i in range(config.vocab_size - len(letters)))])
    writer.add_token_types([1] * len(letters) + [3] * (config.vocab_size - len(letters)))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(config.vocab_size - 1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        numbers, called = tensor.numpy(), f"{names.get_name(layer)}.{kind}"
        if tensor.ndim == 2:
            writer.add_tensor(called, gguf.quants.quantize(numbers, EIGHT_BITS), raw_dtype=EIGHT_BITS)
        else:
            writer.add_tensor(called, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2", head_dim=None)


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write(path, model)
    return path


def opened(model, **options):
    return RAG.from_pretrained(model, embedder=WordEmbedder(), cpu_bytes=1 << 26, device="cpu", **options)


def test_a_file_is_its_numbers(file, model):
    loaded = load_model(file, "cpu", {}).model
    packed = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    want = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(packed, EIGHT_BITS), EIGHT_BITS))
    torch.testing.assert_close(loaded.model.layers[1].mlp.up_proj.weight.float(), want)
    assert not hasattr(loaded.config, "quantization_config"), "where the file lay is no part of the space"
    by_name = load_model(file.parent, "cpu", {"gguf_file": file.name}).model
    assert Runner.of(by_name).fingerprint == Runner.of(loaded).fingerprint


@pytest.mark.parametrize("weights", [None, "int8"])
def test_questions_over_a_file(file, weights, tmp_path):
    with opened(file, path=tmp_path, weights=weights) as rag:
        rag.add_texts([TEXT], ["tarn"])
        found = rag.retrieve(QUESTION)
        prompt = rag.engine.fuse(rag.chunks(found), QUESTION, method=LegoLink(k=1000))
        with torch.no_grad():
            want = rag.engine.model(prompt.input_ids).logits[:, -1]
        torch.testing.assert_close(prompt.logits, want, atol=1e-2, rtol=1e-2)
        assert rag.retriever.catalogue.defaults["gguf_file"] == file.name
    with RAG.open(tmp_path, embedder=WordEmbedder(), cpu_bytes=1 << 26, device="cpu") as rag:
        assert rag.refresh() == 0


def test_what_is_no_model(tmp_path, monkeypatch):
    (tmp_path / "text.gguf").write_text("no weights " * 20)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "odd")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    words = PreTrainedTokenizerFast.from_pretrained(MODEL_PATH, local_files_only=True)
    for name, says in {"text": "magic bytes", "cut": "bytes", "odd": "architecture odd"}.items():
        for tokenizer in (None, words):
            with pytest.raises(UnsupportedModelError, match=rf"{name}.gguf in .* cannot be read: .*{says}"):
                load_model(tmp_path / f"{name}.gguf", "cpu", {}, tokenizer)
    with pytest.raises(ModelNotFoundError, match=r"no.*gone\.gguf"):
        load_model(tmp_path, "cpu", {"gguf_file": "gone.gguf"})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'ragkv\[gguf\]'"):
        load_model(tmp_path / "text.gguf", "cpu", {})


@pytest.mark.long
@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_real_file(weights, tmp_path):
    """``RAGKV_GGUF=models/some.gguf make test-long``: exact, greedy and at 100 %, at the noise of its weights."""
    real = os.environ.get("RAGKV_GGUF")
    if not real:
        pytest.skip("RAGKV_GGUF names no file")
    with RAG.from_pretrained(Path(real), path=tmp_path, embedder=WordEmbedder(), weights=weights, device="cpu") as rag:
        engine: Engine = rag.engine
        chunks = engine.add([TEXT * 4, "Marsk is a lake. It has a dam. " * 9])
        prompt = engine.fuse(chunks[::-1], QUESTION, method=LegoLink(k=10_000))
        with torch.no_grad():
            want = engine.model(prompt.input_ids).logits[:, -1].float()
        difference = (prompt.logits.float() - want).norm() / want.norm()
        assert difference < (1e-4 if weights is None else 1e-2)
        answer = engine.generate(chunks, QUESTION, method="full-prefill", max_new_tokens=8, do_sample=False)
        plain = engine.model.generate(prompt_ids(engine, chunks), max_new_tokens=8, do_sample=False)
        assert answer.token_ids == plain[0, -len(answer.token_ids) :].tolist()


def prompt_ids(engine, chunks):
    return engine.fuse(chunks, QUESTION, method="full-prefill").input_ids

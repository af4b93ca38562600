"""Options of loading work for the bundled model as for any other, or are refused by name."""

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from ragkv import ArgumentError, ModelNotFoundError, PromptError
from ragkv.bundled import MODEL_PATH
from ragkv.model.loading import BUNDLED, OPTIONS, PLACE, load_model
from ragkv.testing import tiny_model


@pytest.fixture
def calls(monkeypatch):
    """Watches what transformers is asked for: model and tokenizer come from the bundled ones."""
    seen = {}

    def watched(kind, make):
        return classmethod(lambda _, name, **options: (seen.update({kind: (name, options)}), make())[1])

    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL_PATH, local_files_only=True)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", watched("tokenizer", lambda: tokenizer))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", watched("model", tiny_model))
    return seen


def test_options_reach_the_bundled_model():
    loaded = load_model(BUNDLED, "cpu", {"dtype": torch.bfloat16, "attn_implementation": "eager"})
    assert loaded.model.dtype == torch.bfloat16 and loaded.model.config._attn_implementation == "eager"
    assert load_model(BUNDLED, "cpu", {}).model.dtype == torch.float32
    assert load_model(BUNDLED, "meta", {}).model.device.type == "meta"


PLACED = {"revision": "v2", "subfolder": "sub", "gguf_file": "m.gguf"}
FETCHED = {"trust_remote_code": True, "token": "t", "cache_dir": "/c", "local_files_only": True}


def test_where_a_model_stands_is_where_its_tokenizer_is(calls):
    loaded = load_model("some/model", "cpu", {**PLACED, **FETCHED, "dtype": "float32", "use_safetensors": True})
    assert calls["tokenizer"] == ("some/model", {**PLACED, **FETCHED})
    name, given = calls["model"]
    assert name == "some/model" and given.pop("quantization_config").dequantize
    assert given == {**PLACED, **FETCHED, "dtype": "float32", "use_safetensors": True}
    assert not loaded.model.training


def test_another_tokenizer(calls):
    own = PreTrainedTokenizerFast.from_pretrained(MODEL_PATH, local_files_only=True)
    assert load_model("some/model", "cpu", {}, own).tokenizer is own and "tokenizer" not in calls
    load_model("some/model", "cpu", {**PLACED, **FETCHED}, "other/tokenizer")
    assert calls["tokenizer"] == ("other/tokenizer", FETCHED)  # the model's place is not its


def test_a_system_message(calls):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL_PATH, local_files_only=True)
    with pytest.raises(PromptError, match="no chat template for a system message"):
        load_model("some/model", "cpu", {}, tokenizer, "Be brief.")
    assert "model" not in calls, "refused before weights are loaded"
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert load_model("m", "cpu", {}, tokenizer, "Be brief.").template.prefix.startswith("<system>Be brief.<user>")
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(PromptError, match="leaves the system message out"):
        load_model("m", "cpu", {}, tokenizer, "Be brief.")


@pytest.mark.parametrize("model", [BUNDLED, "some/model"])
def test_an_unknown_option_is_answered_with_all_there_are(calls, model):
    with pytest.raises(TypeError, match=r"no option no_such_option; there are: .*dtype.*revision.*tokenizer"):
        load_model(model, "cpu", {"no_such_option": 1, "dtype": "float32"})
    assert not calls


@pytest.mark.parametrize("name", [*PLACE, "trust_remote_code", "token", "cache_dir", "config"])
def test_what_means_nothing_for_the_bundled_model(calls, name):
    assert name in OPTIONS
    with pytest.raises(ArgumentError, match=f"{name} cannot be given with the bundled model"):
        load_model(BUNDLED, "cpu", {name: "x"})
    assert not calls
    for own in ({"tokenizer": "x"}, {"system": "x"}):
        with pytest.raises(ArgumentError, match="cannot be given with the bundled model"):
            load_model(BUNDLED, "cpu", {}, **own)


def test_a_model_that_is_not_there(tmp_path):
    for name in (tmp_path / "gone", "./gone"):
        with pytest.raises(ModelNotFoundError, match=r"gone.*no such folder; give another .* model= \(--model\)"):
            load_model(name, "cpu", {})
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"the tokenizer .*gone.*tokenizer= \(--tokenizer\)"):
        load_model(tmp_path, "cpu", {}, tmp_path / "gone")
    weights, data = tmp_path / "model.safetensors", (tmp_path / "model.safetensors").read_bytes()
    words = PreTrainedTokenizerFast.from_pretrained(MODEL_PATH, local_files_only=True)
    for left in (data[: len(data) // 2], b"version https://git-lfs.github.com/spec/v1", b"", None):
        weights.unlink() if left is None else weights.write_bytes(left)  # cut short, or not fetched
        with pytest.raises(ModelNotFoundError, match=r"cannot be loaded: .*--model"):
            load_model(tmp_path, "cpu", {}, words)

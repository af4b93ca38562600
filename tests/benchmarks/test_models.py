"""The walk over all model types: what it says of one that is driven, of one that is refused, and of one that dies."""

import os

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.scripts import load


@pytest.fixture(scope="module")
def models():
    return load("models")


def test_a_default_config_is_shrunk_and_what_is_inside(models):
    small = models.settings(CONFIG_MAPPING["gemma3"])
    assert small["text_config"]["hidden_size"] == 64 and small["text_config"]["sliding_window"] == 16
    assert "sliding_window" not in models.settings(CONFIG_MAPPING["llama"])  # it has none


@pytest.mark.parametrize(
    ("name", "outcome", "why"),
    [("llama", "driven", ""), ("gpt2", "refused", "absolute position"), ("gpt_neo", "not built", "attention_layers")],
)
def test_what_comes_of_a_model(models, name, outcome, why):
    found = models.tried(name)
    assert found.outcome == outcome and why in found.why
    assert (found.error is not None) == (outcome == "driven")


def test_a_process_that_dies_or_takes_too_long_is_told(models, monkeypatch):
    monkeypatch.setattr(models, "tried", lambda name: os._exit(3))
    assert models.alone("llama", 60).why == "its process died (3)"
    monkeypatch.setattr(models, "tried", lambda name: models.time.sleep(60))
    assert models.alone("llama", 0.5).why == "took more than 0.5 s"

"""Options of loading work for the bundled model as for any other, or are refused by name."""

import pytest
import torch

from ragkv.model.loading import BUNDLED, load_model


def test_options_reach_the_bundled_model():
    loaded = load_model(BUNDLED, "cpu", {"dtype": torch.bfloat16, "attn_implementation": "eager"})
    assert loaded.model.dtype == torch.bfloat16 and loaded.model.config._attn_implementation == "eager"
    assert load_model(BUNDLED, "cpu", {}).model.dtype == torch.float32
    assert load_model(BUNDLED, "meta", {}).model.device.type == "meta"
    with pytest.raises(TypeError, match="no_such_option"):
        load_model(BUNDLED, "cpu", {"no_such_option": 1})

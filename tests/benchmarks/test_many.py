"""The comparison of many at once: it runs on packed weights as on others, and says on which."""

import json
import sys

import pytest
import torch

from ragkv import Engine, bundled
from ragkv.testing import tiny_model
from tests.scripts import load


@pytest.mark.parametrize("weights", [None, "int8"])
def test_side_by_side_beside_one_by_one(weights, tmp_path, monkeypatch):
    if weights and "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("FBGEMM is not in this PyTorch")
    many = load("many")
    model, out, packed = tmp_path / "model", tmp_path / "out.json", []
    tiny_model(vocab_size=1792).save_pretrained(model)
    bundled.load()[1].save_pretrained(model)
    asked = ["--model", model, "--requests", 2, "--chunks", 1, "--tokens", 3, "--rounds", 1, "--json", out]
    monkeypatch.setattr(sys, "argv", ["many.py", *map(str, asked), *(["--weights", weights] if weights else [])])
    monkeypatch.setattr(many, "Engine", lambda *args, **options: packed.append(args[0]) or Engine(*args, **options))
    many.main()
    kinds = {type(part).__name__ for part in packed[0].modules()}
    assert ("Int8Linear" in kinds) == (weights == "int8")
    found = json.loads(out.read_text())
    assert (found["weights"], found["requests"], found["dtype"]) == (weights, 2, "torch.float32")
    assert found["throughput"] > 0 and len(found["rounds"]) == 1 and found["rounds"][0]["served"] >= 1

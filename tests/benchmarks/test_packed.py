"""The comparison of packed weights: beside itself nothing differs, packed a little does."""

import json
import sys

import pytest
import torch

from ragkv import bundled
from ragkv.testing import tiny_model
from tests.scripts import load


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="FBGEMM is not in this PyTorch")
def test_packed_beside_float32(tmp_path, monkeypatch):
    packed = load("packed")
    model, data, out = (tmp_path / name for name in ("model", "cases.jsonl", "out.json"))
    tiny_model(vocab_size=1792).save_pretrained(model)
    bundled.load()[1].save_pretrained(model)
    case = {"question": "What grows there?", "answers": ["pears"], "documents": [["Pears grow there.", "It rains."]]}
    data.write_text(json.dumps(case))
    asked = ["--model", model, "--data", data, "--new-tokens", 3, "--json", out, "--weights", "int8, packed"]
    monkeypatch.setattr(sys, "argv", ["packed.py", *map(str, asked)])
    packed.main()
    found = json.loads(out.read_text())
    assert (found["weights"]["float32"]["kl_most"], found["weights"]["float32"]["same"]) == (0, 1)
    assert 0 < found["weights"]["int8, packed"]["kl"] < 0.1
    assert [len(rows) for rows in found["rows"].values()] == [1, 1]

"""The engine on Triton kernels: the same prompts as on their reference."""

import pytest
import torch

from ragkv import CacheBlend, Engine, LegoLink, PromptTemplate, Reuse
from ragkv.testing import random_ids, tiny_model


@pytest.mark.parametrize("architecture", ["llama", "glm"])  # halves; interleaved pairs of a part of each head
def test_prompts_are_those_of_the_reference(device, architecture):
    model = tiny_model(architecture, num_hidden_layers=2).to(device)
    template = PromptTemplate(prefix=[1, 5])
    passages, question = [random_ids(n) for n in (9, 14)], random_ids(3)
    engines = [Engine(model, template=template, kernels=kernels) for kernels in ("reference", "triton")]
    for method in (Reuse(), LegoLink(2), CacheBlend(0.3)):
        want, got = (e.fuse(e.add(passages)[::-1], question, method=method) for e in engines)
        assert (want.report.kernels, got.report.kernels) == ("reference", "triton")
        if method != Reuse():
            assert got.report.attention == "selective (triton)"
        torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)

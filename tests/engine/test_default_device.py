"""PyTorch's default device is somebody else's: the model's is what counts. On the meta device nothing that lies there by mistake
has numbers."""

import pytest
import torch

from ragkv import Engine, TieredStore
from ragkv.testing import random_ids, tiny_model

from .conftest import QUESTION, TEMPLATE

METHODS = ("relevant-tokens:ratio=0.3", "cache-blend:ratio=0.3", "cache-craft", "random:ratio=0.5")
CODECS = ("raw", "lossless", "int8", "int4", "fp8", "cachegen")


@pytest.fixture
def elsewhere():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def answers(engine):
    chunks = [*engine.add([random_ids(17), random_ids(30)]), *engine.add_document([random_ids(9), random_ids(12)])]
    for method in METHODS:
        made = engine.generate(chunks, QUESTION, method=method, max_new_tokens=3, keep_past=True, do_sample=False)
        yield made.token_ids
        yield engine.generate(chunks[:1], [7], past=made.past, max_new_tokens=3, prompt_lookup_num_tokens=2).token_ids
    changed = engine.repair_document(chunks[2:], [random_ids(9), random_ids(11)], behind_tokens=4)
    yield engine.fuse([*changed, chunks[0]], QUESTION, method="oracle:ratio=0.2").logits.argmax().tolist()


@pytest.mark.parametrize("options", [{}, {"kernels": "reference", "graphs": True}, {"paths": True}], ids=str)
def test_answers_are_the_same(options, request):
    model = tiny_model("mistral", num_hidden_layers=2)
    want = list(answers(Engine(model, template=TEMPLATE, **options)))
    request.getfixturevalue("elsewhere")
    assert list(answers(Engine(model, template=TEMPLATE, **options))) == want


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_stored_comes_back(codec, tmp_path, request):
    model, ids = tiny_model(num_hidden_layers=2), [random_ids(40), random_ids(20)]

    def asked(folder):
        """Computed, and then as it was stored."""
        for _ in range(2):
            with TieredStore(folder, cpu_bytes=0, disk_bytes=1 << 24, codec=codec) as store:
                engine = Engine(model, template=TEMPLATE, store=store)
                yield engine.fuse(engine.add(ids), QUESTION).logits

    want = list(asked(tmp_path / "here"))
    request.getfixturevalue("elsewhere")
    for one, other in zip(asked(tmp_path / "there"), want, strict=True):
        torch.testing.assert_close(one, other)

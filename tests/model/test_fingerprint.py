"""The fingerprint is of what runs: whatever changes the numbers changes it, and stored KV of before are not used."""

import copy
import importlib
from contextlib import nullcontext

import pytest
import torch

from ragkv import Engine, ModelChangedError, PromptTemplate, Reuse, UnsupportedModelError
from ragkv.model.runner import Runner
from ragkv.model.weights import device_digest, part_digest
from ragkv.testing import random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6])
QUESTION = random_ids(6)


def full(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits[:, -1]


def check(engine, model, chunks):
    """The engine's answer over chunks that stand where they were made is what the model computes now."""
    prompt = engine.fuse(chunks, QUESTION, method=Reuse())
    assert float((prompt.logits - full(model, prompt.input_ids)).abs().max()) < 1e-4
    return prompt.report.hits


@pytest.mark.parametrize("digest", [lambda raw: part_digest(raw), device_digest])
@pytest.mark.parametrize("size", [7, 70_000, 200_003])
def test_digests_follow_every_byte_and_its_place(digest, size):
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    raw[3], raw[5] = 1, 2
    seen = {digest(raw), digest(raw[1:]), digest(raw[:-1])}
    for change in ((3, 5), (0, size - 1), (size // 2, 1)):
        other = raw.clone()
        other[list(change)] ^= 0x80  # two signs: sums alone would miss it
        swapped = raw.clone()
        swapped[list(change)] = raw[list(reversed(change))]
        seen |= {digest(other), digest(swapped)}
    assert len(seen) >= 3 + 5
    assert digest(raw.clone()) == digest(raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8])
def test_swapped_rows_count(dtype):
    weight = torch.randn(6, 8).mul(10).to(dtype)
    assert part_digest(weight) != part_digest(weight[[1, 0, 2, 3, 4, 5]])
    assert part_digest(weight) == part_digest(weight.clone())


def test_what_kv_do_not_depend_on_is_left_out():
    plain = Runner.of(tiny_model()).fingerprint
    idle = tiny_model()
    for name, value in (
        ("pad_token_id", 3),
        ("output_hidden_states", True),
        ("use_cache", False),
        ("id2label", {0: "a"}),
    ):
        setattr(idle.config, name, value)
    assert Runner.of(idle).fingerprint == plain
    assert Runner.of(tiny_model(attn_implementation="eager")).fingerprint != plain
    assert Runner.of(tiny_model(rms_norm_eps=1e-3)).fingerprint != plain


@pytest.mark.parametrize("kind", ["in place", "replaced", "data"])
def test_changed_weights_are_noticed(kind):
    model = tiny_model()
    engine = Engine(model, template=TEMPLATE)
    chunks, space = engine.add_document([random_ids(20), random_ids(15)]), engine.documents.space
    assert check(engine, model, chunks) == {"cpu": 2}
    projection = model.model.layers[1].self_attn.v_proj
    with torch.no_grad():
        if kind == "in place":
            projection.weight.mul_(-1)
        elif kind == "replaced":
            projection.weight = torch.nn.Parameter(-projection.weight)
        else:
            projection.weight.data.mul_(-1)
            engine.refresh()
    assert check(engine, model, chunks) == {"computed": 2}
    assert engine.documents.space != space
    assert check(engine, model, chunks) == {"cpu": 2}
    with torch.no_grad():
        projection.weight.mul_(-1)
    assert check(engine, model, chunks) == {"cpu": 2}
    assert engine.documents.space == space


def test_what_modules_are_given_besides_is_noticed_wherever_it_is():
    model = tiny_model(num_hidden_layers=1)
    runner, seen = Runner.of(model), set()
    modules = list(model.modules())
    for number, module in enumerate(modules):
        module.register_buffer(f"besides_{number}", torch.ones(1))
        with runner.turn() as fingerprint:
            seen.add(fingerprint)
    assert len(seen) == len(modules)


@pytest.fixture
def walks(monkeypatch):
    """How often all modules of a model were walked through."""
    seen = []
    for name in ("ragkv.model.runner.refuse_state", "ragkv.model.fingerprint.parts"):
        plain = getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2])
        monkeypatch.setattr(name, lambda model, plain=plain: seen.append(plain.__name__) or plain(model))
    return seen


@pytest.mark.parametrize("kind", ["bare", "adapted"])
def test_a_look_at_a_model_that_did_not_change_is_a_glance(kind, walks):
    model = adapted()[1] if kind == "adapted" else tiny_model()
    engine = Engine(model, template=TEMPLATE)
    chunks = engine.add([random_ids(20)])
    engine.fuse(chunks, QUESTION)
    walks.clear()
    assert engine.generate(chunks, QUESTION, max_new_tokens=5, eos_token_id=None).token_ids
    assert walks == []


def amid(engine, change):
    """An answer during which something is changed, behind its second token."""
    said = []

    def processor(ids, scores):
        said.append(ids)
        if len(said) == 2:
            change()
        return scores

    more = {"max_new_tokens": 5, "eos_token_id": None, "logits_processor": [processor]}
    return engine.generate([random_ids(20)], QUESTION, **more).token_ids


def compiled(model):
    model.model.layers[2].mlp._compiled_call_impl = lambda *_: None


def compiled_forward(model):
    module = model.model.layers[2].mlp
    module.forward = lambda *_: None
    module.forward._torchdynamo_orig_callable = None


def moved(model):
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data * 2  # in other memory, which PyTorch counts as no write


def wrapped_in(model):
    mlp = model.model.layers[1].mlp
    mlp.down_proj = torch.nn.Sequential(mlp.down_proj, torch.nn.Dropout(0.1)).eval()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda model: model.model.layers[1].mlp.up_proj.weight.data.__setitem__(0, 0.0), None),  # not counted
        (lambda model: setattr(model.model.layers[1].mlp, "act_fn", torch.nn.Identity()), None),  # nor a weight
        (lambda model: model.model.layers[1].mlp.up_proj.weight.detach().mul_(2), ModelChangedError),
        (moved, ModelChangedError),
        (lambda model: setattr(model.config, "rms_norm_eps", 0.5), ModelChangedError),
        (wrapped_in, ModelChangedError),
        (lambda model: model.train(), UnsupportedModelError),
        (compiled, UnsupportedModelError),
        (compiled_forward, UnsupportedModelError),
    ],
    ids=["data", "module", "in place", "moved", "config", "replaced", "training", "compiled", "compiled forward"],
)
def test_what_changes_amid_an_answer_is_noticed_at_its_next_token(change, error):
    engine = Engine(tiny_model(), template=TEMPLATE)
    with pytest.raises(error) if error else nullcontext():
        amid(engine, lambda: change(engine.model))


def test_adapters_that_change_amid_an_answer_are_noticed():
    model, wrapped, config = adapted()
    wrapped.add_adapter("two", config)
    wrapped.eval()
    engine = Engine(wrapped, template=TEMPLATE)
    layer = model.model.layers[0].self_attn.k_proj
    changes = [
        lambda: wrapped.set_adapter("two"),
        lambda: layer.scaling.update(two=7.0),
        lambda: wrapped.base_model.disable_adapter_layers(),
        lambda: wrapped.base_model.enable_adapter_layers(),
        lambda: wrapped.merge_adapter(),
    ]
    for change in changes:
        with pytest.raises(ModelChangedError):
            amid(engine, change)


def test_graphs_go_with_the_modules_that_they_ran():
    """Though no weight changed."""
    engine = Engine(tiny_model(), template=TEMPLATE)
    before = engine.runner._mark()
    engine.model.model.layers[1].mlp.act_fn = torch.nn.Identity()
    with engine.runner.turn():
        assert engine.runner._mark() != before
    before = engine.runner._mark()
    engine.model.note = "of somebody"
    with engine.runner.turn():
        assert engine.runner._mark() == before


class Scaled(torch.nn.Linear):
    """Saves what it keeps besides as tensors made for that, as bitsandbytes does."""

    scale = 2.0

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}scale"] = torch.tensor([self.scale])


def test_what_is_saved_anew_each_time_is_no_change():
    """Graphs would be let go before every token."""
    model = tiny_model()
    layer = Scaled(64, 64, bias=False)
    model.model.layers[1].self_attn.o_proj = layer
    engine = Engine(model.eval(), template=TEMPLATE)
    engine.fuse(engine.add([random_ids(20)]), QUESTION)
    before, other = engine.runner._mark(), torch.ones(1)
    engine.fuse(engine.add([random_ids(20)]), QUESTION)
    assert engine.runner._mark() == before
    layer.scale = 3.0
    with engine.runner.turn() as fingerprint:
        assert engine.runner._mark() != before and fingerprint not in before
    del other


def test_a_model_that_changes_in_more_than_weights_is_probed_again():
    model = tiny_model()
    engine = Engine(model, template=TEMPLATE)
    chunks = engine.add([random_ids(20)])
    with torch.no_grad():
        model.model.rotary_emb.inv_freq.mul_(0.5)
    assert check(engine, model, chunks) == {"computed": 1}
    assert torch.equal(engine.decoder.rotations[0].inv_freq, model.model.rotary_emb.inv_freq)
    model.train()
    with pytest.raises(UnsupportedModelError, match=r"model\.eval\(\)"):
        engine.fuse(chunks, QUESTION)


def test_offloaded_weights_are_read_where_they_are(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    prints = []
    for number in range(3):
        model = tiny_model()
        with torch.no_grad():
            if number == 1:
                model.model.layers[2].mlp.up_proj.weight[[0, 1]] = model.model.layers[2].mlp.up_proj.weight[[1, 0]]
        if number == 2:
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(model, str(tmp_path / str(number)), execution_device=torch.device("cpu"))
        assert model.model.layers[2].mlp.up_proj.weight.is_meta
        engine = Engine(model, template=TEMPLATE)
        chunks = engine.add([random_ids(20)])
        assert check(engine, model, chunks) == check(engine, model, chunks) == {"cpu": 1}
        prints.append(engine.runner.fingerprint)
    assert prints[0] == prints[2] == Runner.of(tiny_model()).fingerprint != prints[1]


def test_weights_without_numbers_are_refused():
    with torch.device("meta"):
        model = copy.deepcopy(tiny_model()).to("meta")
    with pytest.raises(UnsupportedModelError, match="meta device"):
        _ = Runner.of(model).fingerprint


def adapted():
    peft = pytest.importorskip("peft")
    model = tiny_model()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    return model, peft.get_peft_model(model, config, adapter_name="one").eval(), config


def test_adapters_never_share_kv():
    bare = Runner.of(tiny_model()).fingerprint
    model, wrapped, config = adapted()
    engine = Engine(wrapped, template=TEMPLATE)
    assert Runner.of(wrapped) is Runner.of(model) is engine.runner
    chunks = engine.add([random_ids(20)])
    one = engine.runner.fingerprint
    assert check(engine, wrapped, chunks) == {"cpu": 1}
    wrapped.add_adapter("two", config)  # a second one that is not active
    wrapped.eval()
    assert check(engine, wrapped, chunks) == {"cpu": 1} and engine.runner.fingerprint == one
    wrapped.set_adapter("two")
    assert check(engine, wrapped, chunks) == {"computed": 1}
    two = engine.runner.fingerprint
    with wrapped.disable_adapter():
        assert check(engine, wrapped, chunks) == {"computed": 1}
        assert engine.runner.fingerprint == bare
    wrapped.set_adapter("one")
    assert check(engine, wrapped, chunks) == {"cpu": 1} and engine.runner.fingerprint == one
    wrapped.merge_adapter()
    check(engine, wrapped, chunks)
    merged = engine.runner.fingerprint
    wrapped.unmerge_adapter()
    check(engine, wrapped, chunks)
    layer = model.model.layers[0].self_attn.k_proj
    layer.scaling["one"] *= 2
    assert check(engine, wrapped, chunks) == {"computed": 1}
    assert len({bare, one, two, merged, engine.runner.fingerprint}) == 5


def test_learned_prompt_tokens_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(UnsupportedModelError, match="prompt learning"):
        Engine(peft.get_peft_model(tiny_model(), config).eval())

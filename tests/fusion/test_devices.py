"""A model that is spread over two devices: nothing on one is indexed by what lies on the other."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from ragkv import CacheBlend, Engine, LegoLink, Method, Oracle, PromptTemplate, QuestionAware, Selection
from ragkv.testing import random_ids, tiny_model

SECOND = torch.device("cuda", 1)
# What refuses tensors of two devices, and is used on more than weights here.
STRICT = {
    "__getitem__",
    "index_select",
    "index_copy_",
    "index_fill_",
    "isin",
    "cat",
    "__and__",
    "__or__",
    "stack",
    "__sub__",
}


class Elsewhere(torch.Tensor):
    """A CPU tensor that says it lies on a second device; so does whatever is computed with it."""


def moved(tensor):
    return tensor.as_subclass(Elsewhere) if type(tensor) is torch.Tensor else tensor


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [item for part in value for item in tensors(part)] if isinstance(value, tuple | list) else []


class TwoDevices(TorchFunctionMode):
    """What CUDA does: ``.device`` and ``.to`` tell and move, and indexing across devices raises."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "__get__" and func == torch.Tensor.device.__get__:
            return SECOND if isinstance(args[0], Elsewhere) else func(*args)
        if name == "to" and any(isinstance(item, torch.device) for item in (*args[1:], *kwargs.values())):
            goal = next(item for item in (*args[1:], *kwargs.values()) if isinstance(item, torch.device))
            plain = args[0].as_subclass(torch.Tensor)
            rest = [item for item in args[1:] if not isinstance(item, torch.device)]
            plain = plain.to(*rest) if rest else plain
            return moved(plain) if goal == SECOND else plain
        if kwargs.get("device") == SECOND:
            return moved(func(*args, **{**kwargs, "device": "cpu"}))
        if name in STRICT:
            held = [item for item in tensors((*args, *kwargs.values())) if item.dim()]
            if len({isinstance(item, Elsewhere) for item in held}) > 1:
                raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        return func(*args, **kwargs)


@pytest.fixture
def spread(monkeypatch):
    """An engine whose last two layers run on the second device, moved to and fro as accelerate does it."""
    monkeypatch.setattr(
        torch.version, "cuda", None
    )  # a PyTorch with CUDA would ask the driver what the second device can
    engine = Engine(tiny_model(), template=PromptTemplate(prefix=[1, 5]), piece_tokens=16)
    chunks = engine.add([random_ids(n) for n in (20, 31, 9)])[::-1]
    for layer in engine.decoder.layers[2:]:
        layer.forward = _there(layer.forward)
    engine.model.model.norm.forward = _back(engine.model.model.norm.forward)
    plain = engine.decoder.cache

    def cache(capacity):
        made = plain(capacity)
        for layer in made.layers[2:]:
            layer.key_room, layer.value_room = moved(layer.key_room), moved(layer.value_room)
        return made

    engine.decoder.cache = cache
    return engine, chunks


def _move(value, goal):
    if isinstance(value, torch.Tensor):
        return moved(value) if goal == SECOND else value.as_subclass(torch.Tensor)
    return tuple(_move(item, goal) for item in value) if isinstance(value, tuple) else value


def _there(forward):
    return lambda *args, **kwargs: forward(*_move(args, SECOND), **{k: _move(v, SECOND) for k, v in kwargs.items()})


def _back(forward):
    return lambda hidden: forward(_move(hidden, torch.device("cpu")))


class Halves(Method):
    """Every second token of each check's."""

    def __init__(self, start, checks):
        self.start, self.checks = start, checks

    def select(self, view):
        return Selection(view.layout.reusable[self.start :], checks=self.checks)

    def narrow(self, check):
        assert check.tokens.device == check.fresh_keys.device == check.stored_values.device
        return check.tokens[check.value_deviation() >= 0][::2]


@pytest.mark.parametrize(
    "method",
    [
        LegoLink(4),
        CacheBlend(0.3, check_layer=1),
        CacheBlend(0.3, check_layer=2),
        CacheBlend(gradual=(0.6, 0.4, 0.2), check_layer=1, signal="both"),
        Halves(3, [1, 2, 3]),
        Halves(0, [2, 3]),
        QuestionAware(0.3),
        QuestionAware(0.3, sees=0.5),
        Oracle(0.3),
    ],
    ids=lambda method: type(method).__name__,
)
def test_layers_on_two_devices(spread, method):
    engine, chunks = spread
    with TwoDevices():
        got = engine.fuse(chunks, random_ids(6), method=method)
    alone = Engine(tiny_model(), template=PromptTemplate(prefix=[1, 5]), piece_tokens=16)
    want = alone.fuse(alone.add([random_ids(n) for n in (20, 31, 9)])[::-1], random_ids(6), method=method)
    assert got.recomputed.tolist() == want.recomputed.tolist()
    torch.testing.assert_close(got.logits.as_subclass(torch.Tensor), want.logits, atol=1e-4, rtol=1e-4)

"""How CUDA is asked for a graph, with what PyTorch calls so in its place: which stream, which pool, and what a failure leaves."""

import gc
import inspect
import threading
from contextlib import contextmanager
from weakref import WeakSet

import pytest
import torch

from ragkv.model import capture as module
from ragkv.model.capture import CudaCapture, capturing

GPU = torch.device("cuda", 0)


class Cuda:
    """The calls that were made, in order; streams are names."""

    def __init__(self, monkeypatch):
        self.calls, self.current, self.free, self.broken = [], Stream("default", self), 500, False
        self.begins = inspect.signature(torch.cuda.CUDAGraph.capture_begin)
        for name in ("device", "stream", "Stream", "CUDAGraph", "current_stream", "default_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        self.pools = dict[str, WeakSet[Graph]]()
        pools = iter(["pool", "another pool"])
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: pytest.fail("not while others capture"))
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: pytest.fail("others pay for it"), raising=False)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self.calls.append("what is kept goes"))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, 1000))
        ended = lambda device, pool: self.calls.append(f"{pool} of device {device} takes no more")  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)

    @contextmanager
    def device(self, device):
        assert device == GPU
        yield

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def Stream(self, device):
        return Stream("side", self)

    def CUDAGraph(self):
        return Graph(self)

    def current_stream(self, device):
        return self.current

    def default_stream(self, device):
        return Stream("default", self)


class Stream(str):
    def __new__(cls, name, cuda):
        made = super().__new__(cls, name)
        made.name, made.cuda = name, cuda
        return made

    def wait_stream(self, other):
        self.cuda.calls.append(f"{self} waits for {other}")

    def synchronize(self):
        self.cuda.calls.append(f"{self} is waited for")


class Graph:
    """What it recorded are the calls between its beginning and its end."""

    def __init__(self, cuda):
        self.cuda, self.state = cuda, "new"

    def capture_begin(self, *args, **kwargs):
        how = self.cuda.begins.bind(None, *args, **kwargs).arguments  # it is called as this PyTorch has it
        assert (self.state, self.cuda.current, how["capture_error_mode"]) == ("new", "side", "thread_local")
        assert capturing.locked()
        self.state, pool = "begun", how.get("pool")
        if pool and not self.cuda.pools.setdefault(pool, WeakSet([self])):
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")  # as PyTorch's allocators do
        self.cuda.pools.get(pool, WeakSet()).add(self)
        self.cuda.calls.append(("begin", pool))
        self.since = len(self.cuda.calls)

    def capture_end(self):
        if self.state != "begun" or self.cuda.broken:
            self.cuda.broken, self.state = False, "failed"
            raise RuntimeError("operation failed due to a previous error during capture")
        self.state, self.recorded = "made", self.cuda.calls[self.since :]
        self.cuda.calls.append("end")

    def replay(self):
        assert self.state == "made" and capturing.locked()
        self.cuda.calls.append("replay")


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def test_a_body_runs_beside_then_is_captured_and_replayed(cuda):
    capture, out = CudaCapture(GPU), torch.ones(2)
    assert capture.usable()
    replay = capture(lambda cut: cuda.calls.append(f"body on {cuda.current}") or out)
    assert cuda.calls == [
        "side waits for default",
        "body on side",
        ("begin", "pool"),
        "body on side",
        "end",
        "default waits for side",
    ]
    assert cuda.current == "default"
    assert replay(pytest.fail) is out and cuda.calls[-1] == "replay"
    with torch.cuda.stream(Stream("a user's", cuda)):
        capture.settle()
    assert cuda.calls[-2:] == ["default is waited for", "a user's is waited for"]


def test_a_body_that_is_cut_is_several_graphs_of_one_pool(cuda):
    capture, out, cuts = CudaCapture(GPU), torch.ones(2), (0, 2)

    def body(cut):
        for layer in range(3):
            if layer in cuts:
                cut(layer)
            cuda.calls.append(f"layer {layer}")
        return out

    replay = capture(body)
    assert cuda.calls[1:-1] == [
        *("layer 0", "layer 1", "layer 2"),
        *(
            ("begin", "pool"),
            "end",
            ("begin", "pool"),
            "layer 0",
            "layer 1",
            "end",
            ("begin", "pool"),
            "layer 2",
            "end",
        ),
    ]
    cuda.calls.clear()
    assert replay(lambda layer: cuda.calls.append(f"place from {layer}")) is out
    assert cuda.calls == ["replay", "place from 0", "replay", "place from 2", "replay"]


def test_a_pool_whose_graphs_have_all_gone_is_not_used_again(cuda):
    """PyTorch ends a pool with its last graph, and refuses it from then on: where other weights came, or a longer prompt's room."""
    capture = CudaCapture(GPU)
    first, second = (capture(lambda cut: torch.ones(1)) for _ in range(2))
    del first
    third = capture(lambda cut: torch.ones(1))
    assert cuda.pools.keys() == {"pool"}
    del second, third
    assert capture(lambda cut: torch.ones(1))(pytest.fail) is not None
    assert cuda.pools.keys() == {"pool", "another pool"}


def test_a_failure_is_raised_and_undone(cuda, monkeypatch):
    monkeypatch.setattr(module, "_failed", [])
    capture, ran = CudaCapture(GPU), []
    monkeypatch.setattr(torch, "zeros", lambda *size, device: cuda.calls.append(f"zeros on {device}"))

    def body(cut):
        ran.append(1)
        if len(ran) > 1:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        capture(body)
    assert cuda.calls[1:] == [
        *(("begin", "pool"), "end", "pool of device 0 takes no more"),
        *(("begin", None), "zeros on cuda:0", "end"),  # a capture that goes well ends the other
        "default waits for side",
    ]
    assert cuda.current == "default"
    assert len(module._failed) == 1  # it lives on
    assert capture(lambda cut: torch.ones(1))(pytest.fail) is not None  # the lock is not held
    assert ("begin", "another pool") in cuda.calls


def test_a_failed_graph_s_pool_is_not_used_again_by_those_that_go_on(cuda, monkeypatch):
    monkeypatch.setattr(module, "_failed", [])
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    capture, ran = CudaCapture(GPU), []
    kept = capture(lambda cut: torch.ones(1))
    with pytest.raises(ZeroDivisionError):
        capture(lambda cut: ran.append(1) or 1 / (2 - len(ran)))
    again = capture(lambda cut: torch.ones(1))
    assert kept(pytest.fail) is not again(pytest.fail)
    assert [call[1] for call in cuda.calls if call[0] == "begin"] == ["pool", "pool", None, "another pool"]


def test_a_failure_behind_a_cut_is_undone_too(cuda, monkeypatch):
    monkeypatch.setattr(module, "_failed", [])
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    capture, ran = CudaCapture(GPU), []

    def body(cut):
        cut(0)
        ran.append(1)
        if len(ran) > 1:
            cuda.broken = True  # it cannot be ended either
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        capture(body)
    assert cuda.current == "default" and [graph.state for graph in module._failed] == ["made", "failed"]
    assert cuda.calls[-3:] == [("begin", None), "end", "default waits for side"] and not capturing.locked()


def test_an_interrupt_is_undone_too(cuda, monkeypatch):
    monkeypatch.setattr(module, "_failed", [])
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    capture, ran = CudaCapture(GPU), []

    def body(cut):
        ran.append(1)
        if len(ran) > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(body)
    assert cuda.calls[-3:] == [("begin", None), "end", "default waits for side"] and len(module._failed) == 1


def test_a_body_that_fails_before_its_capture_is_waited_for(cuda):
    """What it reads may be let go behind it, on the default stream."""
    with pytest.raises(ZeroDivisionError):
        CudaCapture(GPU)(lambda cut: 1 / 0)
    assert cuda.calls == ["side waits for default", "default waits for side"]


def test_what_pytorch_keeps_is_given_back_where_little_is_free(cuda):
    capture = CudaCapture(GPU)
    replay = capture(lambda cut: torch.ones(1))
    assert replay(pytest.fail) is not None and "what is kept goes" not in cuda.calls
    cuda.free = 10
    capture(lambda cut: torch.ones(1))
    assert cuda.calls[-4:] == ["what is kept goes", ("begin", "pool"), "end", "default waits for side"]


def test_others_wait_while_launches_are_recorded_alone(cuda):
    """Not while the body runs; and a replay waits for another model's capture."""
    locked, collects = [], []

    def body(cut):
        locked.append(capturing.locked())
        collects.append(gc.isenabled())
        return torch.ones(1)

    replay = CudaCapture(GPU)(body)
    assert locked == [False, True] and collects == [True, False] and gc.isenabled()
    replays = threading.Thread(target=replay, args=(pytest.fail,))
    with capturing:
        replays.start()
        replays.join(0.05)
        assert replays.is_alive() and "replay" not in cuda.calls
    replays.join(10)
    assert cuda.calls[-1] == "replay"


def test_another_stream_has_no_graphs(cuda):
    capture = CudaCapture(GPU)
    with torch.cuda.stream("a user's"):
        assert not capture.usable()
    assert capture.usable()

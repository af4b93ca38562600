"""How CUDA is asked for a graph, with what PyTorch calls so in its place: which stream, which pool, and what a failure leaves."""

import inspect
from contextlib import contextmanager

import pytest
import torch

from ragkv.model import capture as module
from ragkv.model.capture import CudaCapture

GPU = torch.device("cuda", 0)


class Cuda:
    """The calls that were made, in order; streams are names."""

    def __init__(self, monkeypatch):
        self.calls, self.current = [], Stream("default", self)
        self._signature = inspect.signature(torch.cuda.graph.__init__)
        for name in ("device", "stream", "Stream", "CUDAGraph", "graph", "current_stream", "default_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        pools = iter(["pool", "another pool"])
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail("not while others capture"))

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

    def graph(self, *args, **kwargs):
        bound = self._signature.bind(None, *args, **kwargs).arguments  # it is called as this PyTorch has it
        assert bound["stream"].name == "side" and bound["capture_error_mode"] == "thread_local"
        return Recording(self, bound["cuda_graph"], bound["stream"], bound.get("pool"))


class Recording:
    """As PyTorch's: it ends the graph that it has by then, and where a capture fails its stream stays."""

    def __init__(self, cuda, graph, stream, pool):
        self.cuda, self.cuda_graph, self.stream, self.pool = cuda, graph, stream, pool

    def __enter__(self):
        self.before, self.cuda.current = self.cuda.current, self.stream
        self.cuda_graph.capture_begin(self.pool)

    def __exit__(self, *error):
        if error == (None, None, None):
            self.cuda_graph.capture_end()
            self.cuda.current = self.before


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

    def capture_begin(self, pool=None, capture_error_mode="thread_local"):
        assert (self.state, self.cuda.current, capture_error_mode) == ("new", "side", "thread_local")
        self.state = "begun"
        self.cuda.calls.append(("begin", pool))
        self.since = len(self.cuda.calls)

    def capture_end(self):
        assert self.state == "begun"
        self.state, self.recorded = "made", self.cuda.calls[self.since :]
        self.cuda.calls.append("end")

    def replay(self):
        assert self.state == "made"
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
    assert cuda.calls[-3:] == [("begin", None), "zeros on cuda:0", "end"]  # a capture that goes well ends the other
    assert cuda.current == "default"
    assert len(module._failed) == 1  # it lives on
    assert capture(lambda cut: torch.ones(1))(pytest.fail) is not None  # the lock is not held
    assert ("begin", "another pool") in cuda.calls


def test_a_failure_behind_a_cut_is_undone_too(cuda, monkeypatch):
    monkeypatch.setattr(module, "_failed", [])
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    capture, ran = CudaCapture(GPU), []

    def body(cut):
        cut(0)
        ran.append(1)
        if len(ran) > 1:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        capture(body)
    assert cuda.current == "default" and len(module._failed) == 2


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
    assert cuda.calls[-2:] == [("begin", None), "end"] and len(module._failed) == 1


def test_another_stream_has_no_graphs(cuda):
    capture = CudaCapture(GPU)
    with torch.cuda.stream("a user's"):
        assert not capture.usable()
    assert capture.usable()

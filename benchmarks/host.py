"""What a warm prompt takes of the host with CUDA graphs: what a GPU would wait for, measured without one.

    python -P benchmarks/host.py [--tier gpu cpu int8] [--layers 32] [--tokens 16384] [--chunk 512] [--rounds 15]

Chunks lie in the GPU tier, which stands on the CPU, or in the CPU tier, as they are or as int8. Everything up to the launches of
Triton's kernels runs as on a GPU; they are left out, and so are what a graph replays and the copies over the bus, whose number is
printed. Milliseconds of this thread's processor time, least and median. What a GPU would compute
(the tables by which keys turn) is counted as this CPU takes it, and the driver's part of a launch is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

import ragkv
from ragkv.fusion import placement
from ragkv.fusion.bus import Bus
from ragkv.fusion.placement import Placement
from ragkv.kernels import api
from ragkv.kernels.triton_impl import place
from ragkv.model import kernel_attention, rooms
from ragkv.model.capture import Body, Cut, Replay
from ragkv.testing import random_ids, tiny_model

METHODS = (ragkv.Reuse(), ragkv.LegoLink(16), ragkv.SensitiveTokens(0.1), ragkv.RelevantTokens(0.1))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 32, "tokens": 16384, "chunk": 512, "rounds": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tier", nargs="+", choices=("gpu", "cpu", "int8"), default=["gpu", "cpu", "int8"])
    given = parser.parse_args()
    for tier in given.tier:
        print(f"{tier}:")
        prompts(given, tier)


def prompts(given: argparse.Namespace, tier: str) -> None:
    """Measure what lies in one tier."""
    torch.set_num_threads(1)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 16,
    }
    model = tiny_model(num_hidden_layers=given.layers, max_position_embeddings=2 * given.tokens, **shape)
    sizes = (
        {"gpu_bytes": 1 << 30, "device": "cpu"} if tier == "gpu" else {"cpu_codec": "int8" if tier == "int8" else None}
    )
    store = ragkv.TieredStore(**sizes)
    template = ragkv.PromptTemplate(prefix=[1, 2, 3, 4])
    more: dict[str, Any] = {"piece_tokens": 4096, "kernels": "reference", "graphs": True, "sensitivity": True}
    with on_a_gpu() as copies, ragkv.Engine(model, template=template, store=store, method=METHODS[0], **more) as engine:
        graphs = engine.documents.steps.graphs
        assert graphs is not None
        graphs._capture = Recorded()
        chunks = engine.add([random_ids(given.chunk, seed) for seed in range(given.tokens // given.chunk)])
        ask = partial(engine.fuse, chunks, random_ids(32))
        with without_attention():
            for method in METHODS * 3:  # chunks move up; each step runs as it is, and is captured
                ask(method=method)
            with left_out(copies):
                for method in METHODS:
                    measure(partial(ask, method=method), method, given.rounds, copies)


class Recorded:
    """Stands for CUDA's graphs: nothing is replayed."""

    def __call__(self, body: Body) -> Replay:
        cuts = list[int]()
        out = body(cuts.append)

        def replay(between: Cut) -> torch.Tensor:
            for layer in cuts:
                between(layer)
            return out

        return replay

    def usable(self) -> bool:
        return True

    def settle(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 1 << 40


class Copies(Bus):
    """Done at once, or not at all."""

    def __init__(self) -> None:
        self.count, self.live = 0, True

    def room(self, *size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def send(self, load: Callable[[], Any], free: Any = None) -> Callable[[], None]:
        self.count += 1
        if self.live:
            load()
        return lambda: None

    def mark(self) -> None:
        return None


@contextmanager
def on_a_gpu() -> Iterator[Copies]:
    """A block in which chunks are placed as on a GPU."""
    init, copies = Placement.__init__, Copies()

    def by_layer(*args: Any, **more: Any) -> None:
        init(*args, **{**more, "by_layer": True})

    with patch.object(Placement, "__init__", by_layer), patch.object(placement, "bus", lambda device: copies):
        yield copies


@contextmanager
def without_attention() -> Iterator[None]:
    """A block in which rows attend to nothing, for which a CPU would take minutes."""

    def attend(query: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        return query.transpose(0, 1) * 0

    def score(query: torch.Tensor, key: torch.Tensor, *rest: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return query.transpose(0, 1) * 0, key[0, :, 0]

    with (
        patch.object(kernel_attention, "selective_attention", attend),
        patch.object(kernel_attention, "scored_attention", score),
    ):
        yield


@contextmanager
def left_out(copies: Copies) -> Iterator[None]:
    """A block in which nothing is done that a GPU would do."""
    copies.live = False
    with (
        patch.object(api, "implementation", lambda *args: "triton"),
        patch.object(place, "launch", lambda *args, **more: None),
        patch.object(rooms, "_copy", lambda *args: None),
    ):
        yield


def measure(call: Callable[[], ragkv.FusedPrompt], method: ragkv.Method, rounds: int, copies: Copies) -> None:
    """Print what a call takes."""
    times, stages = [], []
    copies.count = 0
    for _ in range(rounds):
        begin = time.thread_time()
        prompt = call()
        times.append((time.thread_time() - begin) * 1e3)
        stages.append(prompt.report.milliseconds)
    assert set(prompt.report.hits) <= {"gpu", "cpu"} and prompt.report.ran == "graph"
    split = ", ".join(f"{name} {min(each[name] for each in stages):.2f}" for name in ("select", "place", "compute"))
    brought = f"; {copies.count // rounds} groups brought" if copies.count else ""
    print(
        f"{method!r}: {min(times):.2f}, median {statistics.median(times):.2f} ms (least of each by the clock: {split}){brought}"
    )


if __name__ == "__main__":
    main()

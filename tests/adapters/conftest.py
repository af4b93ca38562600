import asyncio
import threading

import pytest
import torch

from tests.rag.conftest import model, rag

__all__ = ["held", "model", "rag"]


class Held:
    """A stopping criterion that stops nothing: an answer waits at its first token, until it is let go."""

    def __init__(self):
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, ids, scores, **_):
        self.begun.set()
        assert self.go.wait(60)
        return torch.zeros(len(ids), dtype=torch.bool)

    async def let_go(self):
        """Lets it go from an event loop: if that waited for the model, both would wait for ever."""
        while not self.begun.is_set():
            await asyncio.sleep(0.001)
        self.go.set()


@pytest.fixture
def held():
    made = Held()
    yield made
    made.go.set()

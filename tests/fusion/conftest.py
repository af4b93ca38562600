"""What tests of a prompt share."""

import pytest
import torch


@pytest.fixture
def unwritten(monkeypatch):
    """Has an engine's caches begin as memory that nobody wrote, which may hold anything: here not a number."""

    def poison(engine):
        made = engine.decoder.cache

        def poisoned(capacity):
            cache = made(capacity)
            for layer in cache.layers:
                layer.key_room.fill_(torch.nan)
                layer.value_room.fill_(torch.nan)
            return cache

        monkeypatch.setattr(engine.decoder, "cache", poisoned)

    return poison

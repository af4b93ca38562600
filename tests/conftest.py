import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

# Tiny models gain nothing from threads and lose much where cores are shared.
torch.set_num_threads(1)


@pytest.fixture
def reads(monkeypatch):
    """Watches an engine: a list that grows by the number of tokens of every forward pass that reads documents."""

    def watch(engine):
        seen, read = [], engine.decoder.read
        monkeypatch.setattr(engine.decoder, "read", lambda ids, *rest: (seen.append(len(ids)), read(ids, *rest))[1])
        return seen

    return watch

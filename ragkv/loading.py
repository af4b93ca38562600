"""Loading a model with its tokenizer, and an embedder, by name."""

from __future__ import annotations

import os
from typing import Any

from ragkv.prompt import PromptTemplate
from ragkv.retrieval import Embedder, SentenceTransformerEmbedder

#: The name under which the model that ragkv ships is asked for.
BUNDLED = "bundled"


def load_embedder(embedder: str | Embedder | None) -> Embedder | None:
    """A sentence-transformers model by name; an embedder, or none, is passed through."""
    return SentenceTransformerEmbedder(embedder) if isinstance(embedder, str) else embedder


def load_model(model: str | os.PathLike[str], device: str | None, options: dict[str, Any]):
    """A model in eval mode on its device, its tokenizer, and the template that it brings along, if any."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if model == BUNDLED:
        from ragkv import bundled

        small, words = bundled.load()
        return small.to(device), words, PromptTemplate(**bundled.TEMPLATE)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, **{"dtype": "auto", **options})
    loaded = loaded if "device_map" in options else loaded.to(device)
    return loaded.eval(), AutoTokenizer.from_pretrained(model), None

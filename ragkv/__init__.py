"""Answer questions over documents that a language model has already read.

Every chunk of a document is prefilled once; its keys and values are stored. At query time they are placed in any order, keys are
rotated to their new positions, the few tokens that need it are recomputed, and decoding starts.

Names are loaded when they are first used, so that ``import ragkv`` costs nothing; ``__init__.pyi`` lists them for type checkers.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "advice": ("Advice",),
    "answering": ("AnswerStream",),
    "chunk": ("Chunk", "ChunkKV"),
    "engine": ("Engine",),
    "errors": (
        "ArgumentError",
        "ArgumentTypeError",
        "CalibrationError",
        "ConversationError",
        "DeadlineError",
        "DocumentError",
        "IncompatibleFolderError",
        "IncompleteAnswerError",
        "MethodError",
        "MissingPackageError",
        "ModelChangedError",
        "ModelNotFoundError",
        "NonFiniteError",
        "OverloadedError",
        "PromptError",
        "PromptTooLongError",
        "PublicationError",
        "RagKVError",
        "RecordError",
        "RetrievalError",
        "StoreError",
        "StoreFullError",
        "UnknownArgumentError",
        "UnsupportedModelError",
        "UploadError",
    ),
    "fusion.layout": ("Layout",),
    "fusion.view": ("Check", "Selection", "View"),
    "gate": ("Gate",),
    "library.watching": ("Progress",),
    "methods": (
        "Auto",
        "CacheBlend",
        "CacheCraft",
        "Calibrated",
        "FullPrefill",
        "LegoLink",
        "Method",
        "Oracle",
        "QuestionAware",
        "Random",
        "RelevantTokens",
        "Reuse",
        "SensitiveTokens",
        "Union",
    ),
    "prompt": ("PromptTemplate",),
    "rag": ("RAG",),
    "report": ("Answer", "FusedPrompt", "FusionReport"),
    "retrieval.options": ("Retrieval",),
    "routing": ("route",),
    "scheduling.policies": ("CachedFirst", "Fair"),
    "scheduling.scheduler": ("Scheduler",),
    "store": ("Rates", "TieredStore"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ragkv' has no attribute {name!r}")
    return getattr(import_module(f"ragkv.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

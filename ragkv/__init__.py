"""Answer questions over documents that a language model has already read.

Every chunk of a document is prefilled once; its keys and values are stored. At query time they are placed in any order, keys are
rotated to their new positions, the few tokens that need it are recomputed, and decoding starts.
"""

from ragkv.chunk import Chunk, ChunkKV
from ragkv.engine import Engine
from ragkv.errors import (
    DocumentError,
    IncompatibleFolderError,
    MethodError,
    PromptError,
    PromptTooLongError,
    RagKVError,
    RecordError,
    StoreError,
    StoreFullError,
    UnsupportedModelError,
)
from ragkv.methods import CacheBlend, FullPrefill, LegoLink, Method, Reuse
from ragkv.prompt import PromptTemplate
from ragkv.report import Answer, FusedPrompt, FusionReport
from ragkv.store import TieredStore

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "CacheBlend",
    "Chunk",
    "ChunkKV",
    "DocumentError",
    "Engine",
    "FullPrefill",
    "FusedPrompt",
    "FusionReport",
    "IncompatibleFolderError",
    "LegoLink",
    "Method",
    "MethodError",
    "PromptError",
    "PromptTemplate",
    "PromptTooLongError",
    "RagKVError",
    "RecordError",
    "Reuse",
    "StoreError",
    "StoreFullError",
    "TieredStore",
    "UnsupportedModelError",
]

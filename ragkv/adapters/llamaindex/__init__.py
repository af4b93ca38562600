"""ragkv inside LlamaIndex: ``pip install 'ragkv[llamaindex]'``. Nothing is ever fetched, and no other model is asked.

Raises:
    MissingPackageError: when it is imported, without LlamaIndex.
"""

from ragkv.errors import MissingPackageError

try:
    import llama_index.core  # noqa: F401
except ImportError as error:
    raise MissingPackageError("the adapter needs LlamaIndex: pip install 'ragkv[llamaindex]'") from error

from ragkv.adapters.llamaindex.embedding import RagKVEmbedding
from ragkv.adapters.llamaindex.llm import RagKVLLM
from ragkv.adapters.llamaindex.retriever import RagKVRetriever
from ragkv.adapters.llamaindex.synthesizer import RagKVQueryEngine, RagKVSynthesizer
from ragkv.adapters.llamaindex.vector_store import RagKVVectorStore

__all__ = [
    "RagKVEmbedding",
    "RagKVLLM",
    "RagKVQueryEngine",
    "RagKVRetriever",
    "RagKVSynthesizer",
    "RagKVVectorStore",
]

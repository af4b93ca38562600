"""LangChain: retriever, vector store, embeddings, a chain and a chat model over ragkv (``pip install 'ragkv[langchain]'``)."""

from ragkv.errors import MissingPackageError

try:
    import langchain_core  # noqa: F401
except ImportError as error:
    raise MissingPackageError("LangChain is not installed: pip install 'ragkv[langchain]'") from error

from ragkv.adapters.langchain.chain import create_ragkv_chain
from ragkv.adapters.langchain.chat import ChatRagKV
from ragkv.adapters.langchain.embeddings import LangChainEmbedder, RagKVEmbeddings
from ragkv.adapters.langchain.retriever import RagKVRetriever
from ragkv.adapters.langchain.vectorstore import RagKVVectorStore

__all__ = [
    "ChatRagKV",
    "LangChainEmbedder",
    "RagKVEmbeddings",
    "RagKVRetriever",
    "RagKVVectorStore",
    "create_ragkv_chain",
]

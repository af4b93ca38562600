"""ragkv inside Haystack: ``pip install 'ragkv[haystack]'``.

Raises:
    MissingPackageError: when it is imported, without Haystack.
"""

from ragkv.errors import MissingPackageError

try:
    import haystack  # noqa: F401
except ImportError as error:
    raise MissingPackageError("the adapter needs Haystack: pip install 'ragkv[haystack]'") from error

from ragkv.adapters.haystack.generator import RagKVGenerator
from ragkv.adapters.haystack.retriever import RagKVRetriever

__all__ = ["RagKVGenerator", "RagKVRetriever"]

"""A folder on disk, kept in LMDB: what the KV store and the catalogue both stand on.

lmdb is imported when a folder is opened.
"""

from ragkv.folder.environment import Environment
from ragkv.folder.seal import seal, unseal
from ragkv.folder.transaction import Transaction
from ragkv.folder.translation import translated

__all__ = ["Environment", "Transaction", "seal", "translated", "unseal"]

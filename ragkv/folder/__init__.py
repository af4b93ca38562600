"""A folder on disk, kept in LMDB: what the KV store and the catalogue both stand on.

lmdb is imported when a folder is opened.
"""

from ragkv.folder.connection import problems
from ragkv.folder.environment import Environment
from ragkv.folder.salvage import in_use, refuse_open, replace_damaged, rewrite, salvage
from ragkv.folder.seal import seal, unseal
from ragkv.folder.transaction import Transaction

__all__ = [
    "Environment",
    "Transaction",
    "in_use",
    "problems",
    "refuse_open",
    "replace_damaged",
    "rewrite",
    "salvage",
    "seal",
    "unseal",
]

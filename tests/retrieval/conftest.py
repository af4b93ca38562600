import hashlib

import lmdb
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from ragkv.retrieval import Catalogue, offline_embedder

PROSE = """# The harbour

Ada Lovelace came to the harbour in 1842. She wrote a letter to Mr. Babbage, e.g. about the engine. It was long!

The company sold nets. Did it sell boats? It did not, said Dr. J. R. Smith, who knew.

## Prices

- rope, 3.50 a yard
- tar, 2.25 a pot

| item | price |
|------|-------|
| nets | 12    |

```python
def price(item):

    return 3.5  # a yard
```

The end of the story is told elsewhere. Nobody remembers it.
"""


class HashEmbedder:
    """Words in buckets: equal in every process, and it counts what it is asked for."""

    def __init__(self, dimension=64, name="hash"):
        self.name = name
        self.dimension = dimension
        self.fingerprint = f"{name}/{dimension}"
        self.embedded = []

    def encode_documents(self, texts):
        self.embedded.extend(texts)
        return np.stack([self.encode_query(text) for text in texts])

    def encode_query(self, text):
        vector = np.full(self.dimension, 1e-3, np.float32)
        for word in text.lower().split():
            vector[hashlib.md5(word.encode()).digest()[0] % self.dimension] += 1
        return vector / np.linalg.norm(vector)


@pytest.fixture
def embedder():
    return HashEmbedder()


@pytest.fixture
def catalogue():
    with Catalogue() as catalogue:
        yield catalogue


def put(catalogue, source, passages, metadata=None, embedder=None, **more):
    return catalogue.put(source, passages, (embedder or HashEmbedder()).encode_documents, metadata, **more)


def damaged(path, database, key):
    """Flips a bit in the middle of a record."""
    with lmdb.open(str(path), max_dbs=8, map_size=1 << 30) as env, env.begin(write=True) as txn:
        db = env.open_db(database.encode(), txn)
        record = txn.get(key, db=db)
        txn.put(key, record[:20] + bytes([record[20] ^ 1]) + record[21:], db=db)


def emptied(path, database, key):
    """Leaves nothing of a record but its key."""
    with lmdb.open(str(path), max_dbs=8, map_size=1 << 30) as env, env.begin(write=True) as txn:
        txn.put(key, b"", db=env.open_db(database.encode(), txn))


def lost(path, database, key):
    """Deletes a record behind the catalogue's back."""
    with lmdb.open(str(path), max_dbs=8, map_size=1 << 30) as env, env.begin(write=True) as txn:
        assert txn.delete(key, db=env.open_db(database.encode(), txn))


@pytest.fixture(scope="session")
def minilm():
    return offline_embedder(device="cpu")


def _trained(pre_tokenizer, decoder, alphabet):
    tokenizer = Tokenizer(models.BPE(byte_fallback=not alphabet, unk_token=None if alphabet else "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    special = [] if alphabet else ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=900, show_progress=False, initial_alphabet=alphabet, special_tokens=special
    )
    tokenizer.train_from_iterator([PROSE] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_level():
    """The kind of GPT-2, Llama 3 and Qwen."""
    return _trained(
        pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    )


def metaspace():
    """The kind of Llama 2 and Gemma: a dummy space before the first word, bytes for unknown characters."""
    return _trained(pre_tokenizers.Metaspace(), decoders.Metaspace(), [])


TOKENIZERS = {"byte-level": byte_level(), "metaspace": metaspace(), "slow": ByT5Tokenizer()}


@pytest.fixture(params=TOKENIZERS.values(), ids=TOKENIZERS.keys())
def tokenizer(request):
    return request.param

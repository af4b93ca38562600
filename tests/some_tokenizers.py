"""Small tokenizers of all kinds, and threads that trouble them."""

import sys
import threading

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from ragkv import bundled

LETTERS = [*"abdeimnorstuvx_<|>/[]▁. ", "<0x41>"]


def fast(model, pre_tokenizer, decoder=None, normalizer=None, **names):
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.normalizer = pre_tokenizer, normalizer
    if decoder is not None:
        backend.decoder = decoder
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.add_tokens(
        [
            AddedToken("<|im_start|>", special=True, normalized=False),
            AddedToken("<|im_end|>", special=True, normalized=True),
            AddedToken("<|wide|>", special=True, lstrip=True, rstrip=True),
            AddedToken("<tool>", special=False, normalized=True),
            AddedToken("[raw]", special=False, normalized=False, single_word=True),
        ]
    )
    return tokenizer


def byte_level(**kind):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("<", "|"), ("|", ">"), ("i", "m"), ("s", "t"), ("a", "r"), ("Ġ", "a")]
    vocab = {token: at for at, token in enumerate([*alphabet, *map("".join, merges)])}
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return fast(models.BPE(vocab, merges), pre_tokenizer, decoders.ByteLevel(), eos_token="<|im_end|>", **kind)


def metaspace():
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdeimnorst_<|>/▁"]
    model = models.BPE({t: at for at, t in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    return fast(model, pre_tokenizers.Metaspace(), bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram():
    """Its model knows "<s>" as the likeliest of words."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in LETTERS[:-1])]
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return fast(models.Unigram(pieces, unk_id=0), pre_tokenizers.Metaspace(), **names)


def words(unknown="<unk>", letters=LETTERS):
    """A word is what stands between spaces, a special token too."""
    vocab = {t: at for at, t in enumerate(["<unk>", "<s>", "</s>", *letters, "hello"])}
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": unknown}
    return fast(models.WordLevel(vocab, unk_token=unknown), pre_tokenizers.WhitespaceSplit(), **names)


EXACT = {
    "bundled": bundled.load()[1],
    "byte-level": byte_level(),
    "lower": byte_level(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
    "metaspace": metaspace(),
    "slow": ByT5Tokenizer(),
}
KNOWN_AS_WORDS = {"unigram": unigram(), "words": words()}
EVERY = EXACT | KNOWN_AS_WORDS


def call(tokenizer, text, split):
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=split)["input_ids"])


def forbidden(tokenizer):
    """Ids of what is marked as special, save bytes and the unknown."""
    added = tokenizer.added_tokens_decoder
    return {i for i, t in added.items() if t.special and not t.content.startswith("<0x") and t.content != "<unk>"}


def hammered(tokenizer, work, times):
    """Runs ``work`` in eight threads, ``times`` in each, between calls of the tokenizer with options of all kinds."""
    failures, start = [], threading.Barrier(8)
    options = [
        {},
        {"split_special_tokens": True},
        {"padding": "max_length", "max_length": 40},
        {"truncation": True, "max_length": 3},
        {"split_special_tokens": True, "padding": True, "truncation": True, "max_length": 5},
    ]

    def run(seed):
        start.wait()
        for at in range(times):
            try:
                tokenizer("one <|im_start|> two", **options[(at + seed) % len(options)])
            except RuntimeError as error:  # the user's own race
                assert "borrowed" in str(error)
            try:
                work()
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if failures:
        raise failures[0]

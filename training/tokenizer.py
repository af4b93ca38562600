"""Trains the tokenizer of the bundled model: `python -m training.tokenizer`."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ragkv.bundled import TEMPLATE
from training.world import names
from training.world.generator import questions
from training.world.writer import Shape, write_context

SPECIAL = ["<pad>", "<bos>", "<eos>"]
DEFAULT_PATH = Path(__file__).parent / "results" / "tokenizer"

HEADS = (*names.FIRST_HEADS, *names.LAST_HEADS, *names.FIRM_HEADS, *names.TOWN_HEADS)
TAILS = (*names.FIRST_TAILS, *names.LAST_TAILS, *names.FIRM_TAILS, *names.TOWN_TAILS)


def joint() -> str:
    """A pattern for the head of a name part whose tail follows.

    Names are cut there: no name part becomes one token, which held-out ones could not be, and none is cut elsewhere, where a
    held-out one would give tokens that training has never seen together.
    """
    heads, tails = ("|".join(sorted(set(parts), key=len, reverse=True)) for parts in (HEADS, TAILS))
    return rf"▁?(?:{heads})(?=(?:{tails})(?!\w))"


def corpus(contexts: int, seed: int) -> Iterator[str]:
    """Texts of training contexts, their questions and answers, and the parts of the template."""
    rng = random.Random(seed)
    for _ in range(contexts):
        context = write_context(rng, Shape())
        yield from context.chunks
        for question in questions(rng, context):
            yield question.text
            yield question.answer
        yield from (part for part in TEMPLATE.values() if part)


def train(vocabulary: int, contexts: int, seed: int) -> PreTrainedTokenizerFast:
    """Trains a BPE that keeps whitespace, splits digits in pairs, and falls back to bytes.

    A segment's first word is tokenised like a word after a space, so a name has the same ids wherever it stands.
    """
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=False))
    words = [
        pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first"),
        pre_tokenizers.Split(Regex(r"\n|▁?\d{1,2}|[^\w\s▁]"), "isolated"),
        pre_tokenizers.Split(Regex(joint()), "isolated"),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL + bytes_, show_progress=False)
    tokenizer.train_from_iterator(corpus(contexts, seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """Reads the arguments, trains, saves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=1792, help="tokens, the 256 bytes included")
    parser.add_argument("--contexts", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DEFAULT_PATH)
    args = parser.parse_args()
    train(args.vocabulary, args.contexts, args.seed).save_pretrained(args.out)
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()

"""Your own retriever, ragkv's engine: whatever finds passages, the engine answers over their stored KV.

Passages become chunks once, with `Engine.add_document`. At query time your retriever names passages, and the engine is given
their chunks. Here fifteen lines of keyword search (a question's rare words count most) stand for your search engine.

    python examples/your_own_retriever.py "On which river does Clearport lie?"
"""

import math
import re
import sys
from collections import Counter

from ragkv import Chunk, Engine, PromptTemplate, bundled


class KeywordRetriever:
    """Ranks passages by the words that they share with a question, each weighted by how rare it is."""

    def __init__(self, passages: list[str]):
        self.words = [set(re.findall(r"\w+", passage.lower())) for passage in passages]
        seen = Counter(word for words in self.words for word in words)
        self.weight = {word: math.log(len(passages) / count) for word, count in seen.items()}

    def search(self, question: str, top_k: int) -> list[int]:
        """Numbers of the best passages, best first."""
        asked = re.findall(r"\w+", question.lower())
        scores = [sum(self.weight[word] for word in asked if word in words) for words in self.words]
        return sorted(range(len(scores)), key=lambda number: -scores[number])[:top_k]


def main() -> None:
    """Read the bundled documents, then answer one question."""
    question = sys.argv[1] if len(sys.argv) > 1 else "On which river does Clearport lie?"
    model, tokenizer = bundled.load()
    template = PromptTemplate(**bundled.TEMPLATE)
    with Engine(model, tokenizer, template=template, foreign=bundled.foreign()) as engine:
        chunks: list[Chunk] = []
        for text in bundled.documents().values():
            chunks += engine.add_document(text.strip().split("\n\n"))

        retriever = KeywordRetriever([chunk.text or "" for chunk in chunks])
        found = [chunks[number] for number in retriever.search(question, top_k=3)]
        answer = engine.generate(found, question, max_new_tokens=24)

    print(f"{question}\n{answer.text.strip()}\n")
    for chunk, source in zip(found, answer.report.fusion.sources, strict=True):
        print(f"- KV from {source}: {chunk.text}")


if __name__ == "__main__":
    main()

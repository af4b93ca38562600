"""Questions whose answer stands in a passage that does not name its subject, by rule from SQuAD and MuSiQue files.

    python benchmarks/unnamed.py xquad.en.json musique_dev.jsonl --out unnamed.jsonl

A passage does not name its subject where it opens with a pronoun, or has no word of its document's title. Of a SQuAD file:
every question whose paragraph, not the first of its article, is such a one. In the prompt stand that paragraph and the
passages of other articles that are found for the question (5 in all, in the order of the search); no other paragraph of its
own article. Of a MuSiQue file: every question with a supporting paragraph of this kind. A paragraph's document is its
title, as a chunk, and its text, as another; the texts are in the prompt, the titles are not.

So what the passage is about stands in its document, and not in the prompt: `@document` may know it, `@alone` and a full
prefill of the chunks cannot. The output is of ragkv's own form: `ragkv eval --data unnamed.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ragkv.retrieval import Retriever

Record = dict[str, Any]
PASSAGES = 5
_PRONOUN = re.compile(r"(he|she|it|they|his|her|its|their|this|these|that|those)\b", re.IGNORECASE)
_COMMON = frozenset(
    ("the", "and", "for", "with", "from", "that", "list", "this", "film", "song", "album", "band", "series")
)


def unnamed(title: str, text: str) -> bool:
    """Whether a passage opens with a pronoun, or has no word of its document's title."""
    words = {word for word in re.findall(r"\w+", title.lower().replace("_", " ")) if len(word) > 2} - _COMMON
    return bool(words) and (bool(_PRONOUN.match(text.strip())) or not words & set(re.findall(r"\w+", text.lower())))


def of_squad(articles: Sequence[Record]) -> Iterator[Record]:
    """Cases of a SQuAD file's articles."""
    documents = [[paragraph["context"] for paragraph in article["paragraphs"]] for article in articles]
    titles = [article["title"].replace("_", " ") for article in articles]
    for document, title in zip(documents, titles, strict=True):
        document[0] = f"{title}\n{document[0]}"
    with closing(Retriever.open()) as retriever:
        for number, document in enumerate(documents):
            retriever.add(str(number), document)
        for number, article in enumerate(articles):
            for at, paragraph in enumerate(article["paragraphs"]):
                if at and unnamed(titles[number], paragraph["context"]):
                    for asked in paragraph["qas"]:
                        yield _asked(asked, documents, (number, at), retriever)


def _asked(asked: Record, documents: list[list[str]], gold: tuple[int, int], retriever: Retriever) -> Record:
    hits = retriever.search(asked["question"], sum(map(len, documents)), hybrid=True)
    found = [(int(hit.source), hit.position) for hit in hits]
    others = [place for place in found if place[0] != gold[0]][: PASSAGES - 1]
    places = [place for place in found if place == gold or place in others]
    numbers = {document: n for n, document in enumerate(dict.fromkeys(document for document, _ in places))}
    return {
        "id": asked["id"],
        "kind": "squad",
        "question": asked["question"],
        "answers": list(dict.fromkeys(answer["text"] for answer in asked["answers"])),
        "documents": [documents[document] for document in numbers],
        "retrieved": [[numbers[document], chunk] for document, chunk in places],
        "gold": [[numbers[gold[0]], gold[1]]],
    }


def of_musique(records: Sequence[Record]) -> Iterator[Record]:
    """Cases of a MuSiQue file's records."""
    for record in records:
        if not record.get("answerable", True):
            continue
        passages = record["paragraphs"]
        gold = [number for number, passage in enumerate(passages) if passage.get("is_supporting")]
        if any(unnamed(passages[number]["title"], passages[number]["paragraph_text"]) for number in gold):
            yield {
                "id": record["id"],
                "kind": "musique",
                "question": record["question"],
                "answers": [record["answer"], *(record.get("answer_aliases") or [])],
                "documents": [[passage["title"], passage["paragraph_text"]] for passage in passages],
                "retrieved": [[number, 1] for number in range(len(passages))],
                "gold": [[number, 1] for number in gold],
            }


def cases_of(path: Path) -> Iterator[Record]:
    """Cases of a file of either form."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith('{"data"') or (text.lstrip().startswith("{") and '"qas"' in text[:10_000]):
        return of_squad(json.loads(text)["data"])
    return of_musique(
        json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.split("\n") if line]
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Questions whose answer's passage does not name its subject.")
    parser.add_argument("files", nargs="+", type=Path, help="of SQuAD's or MuSiQue's form")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines of ragkv's own form")
    args = parser.parse_args(argv)
    cases = [case for path in args.files for case in cases_of(path)]
    args.out.write_text("".join(json.dumps(case, ensure_ascii=False) + "\n" for case in cases), encoding="utf-8")
    print(f"{len(cases)} cases: {args.out}")


if __name__ == "__main__":
    main()

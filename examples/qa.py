"""Files in, questions answered.

Without arguments it runs offline: the bundled model answers over the bundled documents.

    python examples/qa.py
    python examples/qa.py docs/ notes.md --model Qwen/Qwen3-0.6B --path kv/ --question "Who wrote the notes?"

With --path documents, vectors and KV are kept: the second run reads nothing.
"""

import argparse

import ragkv
from ragkv import bundled


def main() -> None:
    """Add files, ask questions."""
    parser = argparse.ArgumentParser(description="Files in, questions answered.")
    parser.add_argument(
        "files", nargs="*", help="files and folders; by default what the folder has, or the bundled documents"
    )
    parser.add_argument("--question", action="append", help="may be given several times")
    parser.add_argument(
        "--model", help="name or path of a transformers decoder; by default the folder's own, or bundled"
    )
    parser.add_argument("--path", help="folder that keeps documents, vectors and KV")
    args = parser.parse_args()
    questions = args.question or [known.question for known in bundled.questions()[:3]]

    with ragkv.RAG.from_pretrained(args.model, path=args.path) as rag:
        if args.files:
            added = rag.add_files(args.files)
        else:
            documents = {} if rag.documents() else bundled.documents()
            added = rag.add_texts(list(documents.values()), list(documents))
        print(f"{len(added.changes)} document(s), {added.tokens_read} tokens read")
        for skipped in added.skipped:
            print(f"skipped {skipped.source}: {skipped.reason}")

        for question in questions:
            answer = rag.ask(question, top_k=5, max_new_tokens=64)
            print(f"\n{question}\n  {answer.text.strip()}")
            print(f"  first token after {answer.report.first_token_ms:.1f} ms; from", end=" ")
            print(", ".join(f"{hit.source} (passage {hit.position + 1})" for hit in answer.sources))


if __name__ == "__main__":
    main()

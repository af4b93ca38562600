"""A conversation over documents, in the terminal.

Without arguments it runs offline: the bundled model answers over the bundled documents. An empty line, or the end of the input,
ends it.

    python examples/chat.py
    python examples/chat.py docs/ --model Qwen/Qwen3-0.6B --path kv/ --system "Answer in one sentence."
"""

import argparse
import sys

import ragkv
from ragkv import bundled


def main() -> None:
    """Add files, then answer line by line."""
    parser = argparse.ArgumentParser(description="A conversation over documents.")
    parser.add_argument(
        "files", nargs="*", help="files and folders; by default what the folder has, or the bundled documents"
    )
    parser.add_argument(
        "--model", help="name or path of a transformers decoder; by default the folder's own, or bundled"
    )
    parser.add_argument("--path", help="folder that keeps documents, vectors and KV")
    parser.add_argument("--system", help="a system message")
    args = parser.parse_args()

    with ragkv.RAG.from_pretrained(args.model, path=args.path) as rag:
        if args.files:
            rag.add_files(args.files)
        elif not rag.documents():
            documents = bundled.documents()
            rag.add_texts(list(documents.values()), list(documents))
        session = rag.session(system=args.system)
        for line in sys.stdin:
            if not line.strip():
                break
            sources, pieces = session.stream(line.strip(), top_k=3, max_new_tokens=64)
            for piece in pieces:
                print(piece, end="", flush=True)
            print(f"\n  from {', '.join(dict.fromkeys(hit.source for hit in sources))}")
            tokens = pieces.report.fusion.tokens
            print(f"  tokens: {', '.join(f'{number} {kind}' for kind, number in tokens.items())}\n")


if __name__ == "__main__":
    main()

"""LangChain over ragkv: the retriever, the chain, and what an answer cost.

Without arguments it runs offline: the bundled model answers over the bundled documents. `langchain_before.py` and
`langchain_after.py` show a program written for LangChain, and the same one over ragkv.

    python examples/langchain_qa.py
    python examples/langchain_qa.py "Who wrote the notes?" --files docs/ --model Qwen/Qwen3-0.6B --path kv/
"""

import argparse

from ragkv import RAG, bundled
from ragkv.adapters.langchain import RagKVRetriever, create_ragkv_chain


def main() -> None:
    """Add files, ask a question twice: in one piece, and as a stream."""
    parser = argparse.ArgumentParser(description="LangChain over ragkv.")
    parser.add_argument("question", nargs="?", default="On which river does Clearport lie?")
    parser.add_argument(
        "--files", nargs="*", help="files and folders; by default what the folder has, or the bundled documents"
    )
    parser.add_argument("--model", help="name or path of a transformers decoder")
    parser.add_argument("--path", help="folder that keeps documents, vectors and KV")
    args = parser.parse_args()

    with RAG.from_pretrained(args.model, path=args.path) as rag:
        if args.files:
            rag.add_files(args.files)
        elif not rag.documents():
            documents = bundled.documents()
            rag.add_texts(list(documents.values()), list(documents))

        chain = create_ragkv_chain(RagKVRetriever(rag=rag, k=4), rag, max_new_tokens=32)
        result = chain.invoke(args.question)
        print(f"{result['question']}\n  {result['answer'].strip()}")
        for document in result["context"]:
            print(f"  - {document.metadata['source']}, {document.metadata['score']:.2f}: {document.page_content}")
        print(f"  chunks by where their KV came from: {result['report']['fusion']['hits']}")

        for part in chain.stream(args.question):
            print(part.get("answer", ""), end="|" if part.get("answer") else "", flush=True)
        print()


if __name__ == "__main__":
    main()

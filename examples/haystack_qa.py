"""Haystack over ragkv: a pipeline that finds and answers, written into a file and loaded back; and another retriever in it.

Without arguments it runs offline: the bundled model answers over a few of the bundled documents.

    python examples/haystack_qa.py
    python examples/haystack_qa.py "Who wrote the notes?" --files docs/ --model Qwen/Qwen3-0.6B --path kv/
"""

import argparse
import tempfile
from typing import Any

from haystack import Document, Pipeline
from haystack.components.retrievers.in_memory import InMemoryBM25Retriever
from haystack.document_stores.in_memory import InMemoryDocumentStore

from ragkv import RAG, bundled
from ragkv.adapters.haystack import RagKVGenerator, RagKVRetriever


def joined(retriever: Any, generator: RagKVGenerator) -> Pipeline:
    """A pipeline of the two."""
    pipeline = Pipeline()
    pipeline.add_component("retriever", retriever)
    pipeline.add_component("generator", generator)
    pipeline.connect("retriever.documents", "generator.documents")
    return pipeline


def ask(pipeline: Pipeline, question: str) -> None:
    """Run a pipeline; show the answer, its documents, and where their KV came from."""
    said = pipeline.run({"retriever": {"query": question}, "generator": {"query": question}})["generator"]
    print(f"  {said['replies'][0].strip()}")
    for document in said["documents"]:
        print(f"  - {document.meta.get('source')}: {document.content!r:.60}")
    print(f"  documents by where their KV came from: {said['meta'][0]['report']['fusion']['hits']}")


def main() -> None:
    """Add files, ask a question by two pipelines."""
    parser = argparse.ArgumentParser(description="Haystack over ragkv.")
    parser.add_argument("question", nargs="?", default="On which river does Clearport lie?")
    parser.add_argument(
        "--files", nargs="*", help="files and folders; by default what the folder has, or some bundled documents"
    )
    parser.add_argument("--model", help="name or path of a transformers decoder")
    parser.add_argument(
        "--path", help="folder that keeps documents, vectors and KV; by default one that goes at the end"
    )
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        path = args.path or temporary
        with RAG.from_pretrained(args.model, path=path) as rag:
            if args.files:
                rag.add_files(args.files)
            elif not rag.documents():
                documents = dict(list(bundled.documents().items())[:6])
                rag.add_texts(list(documents.values()), list(documents))

        answer = {"max_new_tokens": 32}
        written = joined(RagKVRetriever(path, top_k=4), RagKVGenerator(path, answer)).dumps()
        pipeline = Pipeline.loads(written, allowed_modules=["ragkv.*"])
        print(args.question)
        ask(pipeline, args.question)

        store = InMemoryDocumentStore()
        store.write_documents([Document(content="Clearport lies on the river Exe.")])
        other = joined(InMemoryBM25Retriever(store), RagKVGenerator(path, answer))  # the same folder, opened once
        for times in ("once", "again"):
            print(f"over a document of another retriever, {times}")
            ask(other, args.question)
        pipeline.close()
        other.close()


if __name__ == "__main__":
    main()

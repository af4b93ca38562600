"""LlamaIndex over ragkv: an index of nodes in a folder, a query engine over it, and somebody else's nodes.

Without arguments it runs offline: the bundled model answers over a few of the bundled documents.

    python examples/llamaindex_qa.py
    python examples/llamaindex_qa.py "Who wrote the notes?" --model Qwen/Qwen3-0.6B --path kv/
"""

import argparse

from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.node_parser import TokenTextSplitter
from llama_index.core.response import Response
from llama_index.core.schema import NodeWithScore, TextNode

from ragkv import RAG, bundled
from ragkv.adapters.llamaindex import RagKVEmbedding, RagKVLLM, RagKVSynthesizer, RagKVVectorStore


def show(response: Response) -> None:
    """The answer, its nodes, and where their KV came from."""
    print(f"  {str(response).strip()}")
    for found in response.source_nodes:
        print(f"  - {found.node.ref_doc_id}: {found.node.get_content()!r:.60}")
    print(f"  nodes by where their KV came from: {response.metadata['ragkv']['report']['fusion']['hits']}")


def main() -> None:
    """Index documents, ask a question over them, then over a node that no folder knows."""
    parser = argparse.ArgumentParser(description="LlamaIndex over ragkv.")
    parser.add_argument("question", nargs="?", default="On which river does Clearport lie?")
    parser.add_argument("--model", help="name or path of a transformers decoder")
    parser.add_argument("--path", help="folder that keeps documents, vectors and KV")
    args = parser.parse_args()

    with RAG.from_pretrained(args.model, path=args.path) as rag:
        index = VectorStoreIndex.from_documents(
            [Document(text=text, id_=name) for name, text in list(bundled.documents().items())[:6]],
            storage_context=StorageContext.from_defaults(vector_store=RagKVVectorStore(rag)),
            embed_model=RagKVEmbedding(rag),
            transformations=[
                TokenTextSplitter(chunk_size=64, chunk_overlap=0, tokenizer=rag.engine.tokenizer.tokenize)
            ],
        )
        answers = RagKVSynthesizer(rag, max_new_tokens=32)
        engine = index.as_query_engine(llm=RagKVLLM(rag), response_synthesizer=answers, similarity_top_k=4)
        print(args.question)
        show(engine.query(args.question))

        foreign = NodeWithScore(node=TextNode(text="Clearport lies on the river Exe."))
        for times in ("once", "again"):
            print(f"over a node of another retriever, {times}")
            show(answers.synthesize(args.question, [foreign]))


if __name__ == "__main__":
    main()

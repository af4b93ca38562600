"""A web service: questions in, answers out as server-sent events. A connection that is closed stops the model.

    pip install fastapi uvicorn
    python examples/web.py docs/ --model Qwen/Qwen3-0.6B --path kv/
    curl -N 'http://127.0.0.1:8000/ask?question=Who+wrote+the+notes%3F'

Without arguments the bundled model answers over the bundled documents.
"""

import argparse
import json
from collections.abc import AsyncIterator
from contextlib import aclosing

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

import ragkv
from ragkv import bundled


def web(rag: ragkv.RAG, max_new_tokens: int = 64) -> FastAPI:
    """The service over documents that were added."""
    app = FastAPI()

    async def events(question: str) -> AsyncIterator[str]:
        async with aclosing(rag.astream(question, max_new_tokens=max_new_tokens)) as answer:
            try:
                async for piece in answer:
                    yield f"data: {json.dumps({'text': piece})}\n\n"
            except ragkv.RagKVError as error:
                yield f"event: error\ndata: {json.dumps({'error': str(error)})}\n\n"
            else:
                sources = [{"source": hit.source, "passage": hit.position + 1} for hit in answer.sources]
                yield f"event: sources\ndata: {json.dumps(sources)}\n\n"

    @app.get("/ask")
    async def ask(question: str) -> StreamingResponse:
        return StreamingResponse(events(question), media_type="text/event-stream")

    return app


def main() -> None:
    """Add files, serve."""
    parser = argparse.ArgumentParser(description="Questions in, answers out as server-sent events.")
    parser.add_argument(
        "files", nargs="*", help="files and folders; by default what the folder has, or the bundled documents"
    )
    parser.add_argument(
        "--model", help="name or path of a transformers decoder; by default the folder's own, or bundled"
    )
    parser.add_argument("--path", help="folder that keeps documents, vectors and KV")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    with ragkv.RAG.from_pretrained(args.model, path=args.path) as rag:
        if args.files:
            rag.add_files(args.files)
        elif not rag.documents():
            documents = bundled.documents()
            rag.add_texts(list(documents.values()), list(documents))
        uvicorn.run(web(rag), port=args.port)


if __name__ == "__main__":
    main()

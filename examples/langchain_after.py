"""The program of `langchain_before.py` over ragkv: four lines become three.

Passages are read when they are added, and their KV are kept in the folder `kv/`; the model finds the retrieved ones in its message
and takes their KV from there.

    python examples/langchain_after.py
"""

import zlib

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough

from ragkv import bundled
from ragkv.adapters.langchain import ChatRagKV, RagKVVectorStore


class Words(Embeddings):
    """A bag of hashed words."""

    def embed_query(self, text: str) -> list[float]:
        """How often each word is there, the long ones counting more."""
        vector = [0.0] * 256
        for word in text.replace(".", "").replace("?", "").split():
            vector[zlib.crc32(word.encode()) % 256] += len(word)
        return vector

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """See above."""
        return [self.embed_query(text) for text in texts]


def join(documents: list[Document]) -> str:
    """What stands in the prompt."""
    return "\n\n".join(document.page_content for document in documents)


parts = [part for text in bundled.documents().values() for part in text.strip().split("\n\n")]
store = RagKVVectorStore.from_texts([], Words(), path="kv/")
store.add_documents([Document(page_content=part) for part in parts])
retriever = store.as_retriever(search_kwargs={"k": 3})
prompt = ChatPromptTemplate.from_template("{context}\n\n{question}")
model = ChatRagKV(rag=store.rag, max_tokens=24)
chain = {"context": retriever | join, "question": RunnablePassthrough()} | prompt | model | StrOutputParser()

print(chain.invoke("On which river does Clearport lie?").strip())

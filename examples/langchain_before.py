"""A program written for LangChain; `langchain_after.py` is the same one over ragkv.

A model that only repeats what it was told stands for the service that it would ask, and a bag of words for its embeddings.

    python examples/langchain_before.py
"""

import zlib

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore

from ragkv import bundled


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
store = InMemoryVectorStore(Words())
store.add_documents([Document(page_content=part) for part in parts])
retriever = store.as_retriever(search_kwargs={"k": 3})
prompt = ChatPromptTemplate.from_template("{context}\n\n{question}")
model = FakeListChatModel(responses=["I was told to say this."])
chain = {"context": retriever | join, "question": RunnablePassthrough()} | prompt | model | StrOutputParser()

print(chain.invoke("On which river does Clearport lie?").strip())

"""LangChain's own tests for chat models."""

import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from ragkv.adapters.langchain import ChatRagKV, RagKVRetriever
from tests.rag.rags import DOCUMENTS, QUESTION, open_rag

DETAILS = ["cache_read_input", "cache_creation_input"]


@pytest.fixture(scope="module")
def filled():
    with open_rag() as opened:
        opened.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        yield opened


class Fixed:
    """What is known of this chat model."""

    @pytest.fixture(autouse=True)
    def over(self, filled):
        self.rag = filled

    @property
    def chat_model_class(self):
        return ChatRagKV

    @property
    def chat_model_params(self):
        return {"rag": self.rag}

    @property
    def has_tool_calling(self):
        return False

    @property
    def has_structured_output(self):
        return False

    @property
    def supports_model_override(self):
        return False


class TestUnit(Fixed, ChatModelUnitTests):
    pass


class TestIntegration(Fixed, ChatModelIntegrationTests):
    @property
    def supported_usage_metadata_details(self):
        return {"invoke": DETAILS, "stream": DETAILS}

    def invoke_with_cache_read_input(self, *, stream=False):
        answer = self._asked(stream)
        assert answer.usage_metadata["input_token_details"]["cache_read"] > 0
        return answer

    def invoke_with_cache_creation_input(self, *, stream=False):
        self.rag.engine.store.remove_many(list(self.rag.engine.documents.keys(self.rag.chunks(self._hits()))))
        answer = self._asked(stream)
        assert answer.usage_metadata["input_token_details"]["cache_creation"] > 0
        return answer

    def _hits(self):
        return self.rag.retrieve(QUESTION, 2)

    def _asked(self, stream):
        """The answer to a question behind passages that were found."""
        found = RagKVRetriever(rag=self.rag, k=2).invoke(QUESTION)
        message = "\n\n".join(document.page_content for document in found) + f"\n\n{QUESTION}"
        chat = ChatRagKV(rag=self.rag, max_tokens=4)
        if not stream:
            return chat.invoke(message)
        first, *parts = chat.stream(message)
        return sum(parts, first)

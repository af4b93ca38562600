"""What stands in front of documents: the benchmark's templates and figures."""

import pytest

from ragkv import PromptTemplate, bundled
from ragkv.evaluation import Bench, Case
from ragkv.evaluation.cases import everything
from ragkv.prompt import Encoder
from ragkv.testing import tiny_model
from tests.scripts import load

CHAT = "{% for m in messages %}<eos>{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}<eos>assistant:"


@pytest.fixture(scope="module")
def fronts():
    return load("fronts")


@pytest.mark.parametrize("chat", [None, CHAT])
def test_the_prompt_has_an_example_and_documents_are_read_behind_it(fronts, chat):
    tokenizer = bundled.load()[1]
    tokenizer.chat_template = chat
    made = fronts.fronts(tokenizer)
    plain, example, neutral = (Encoder(made[name], tokenizer, 1792) for name in ("plain", "example", "neutral"))
    assert fronts.EXAMPLE in made["example"].prefix and example.anchor == example.prefix
    assert neutral.prefix == plain.prefix == plain.anchor
    assert fronts.FOREIGN in made["neutral"].anchor and made["neutral"].anchor.startswith(made["plain"].prefix)


def test_each_front_is_compared_with_nothing_in_front_and_with_its_own_full_prefill(fronts):
    documents = (("Anna plays the harp.",), ("Bert sings.", "He lives here."))
    case = Case("a", "all", "What does Anna play?", ("harp",), documents, everything(documents))
    tokenizer = bundled.load()[1]
    model, plain = tiny_model(vocab_size=1792), PromptTemplate(**bundled.TEMPLATE)
    row = fronts.asked(Bench(model, tokenizer, plain, max_new_tokens=2), case)
    assert row["kl full-prefill"] == 0 < row["kl reuse"] and 0 <= row["f1 reuse"] <= 1
    assert not any(
        name.startswith("f1") for name in fronts.asked(Bench(model, tokenizer, plain, max_new_tokens=0), case)
    )
    other = {name: value + (name != "f1 full-prefill") for name, value in row.items()}
    figures = fronts.summed({"a": {"plain": row, "example": other}}, {})
    assert figures["example kl reuse"]["more than plain"][0] == pytest.approx(1)
    less = 1 + row["f1 reuse"] - row["f1 full-prefill"]
    assert figures["example f1 reuse"]["more than full"][0] == pytest.approx(less)
    assert set(figures["plain kl reuse"]) == {"mean"}

"""The bench: one model with its engine, on which arms are run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from ragkv.chunk import Chunk
from ragkv.detokenizer import cut, stop_texts
from ragkv.engine import Engine
from ragkv.errors import MethodError, PromptError, PromptTooLongError, UnsupportedModelError
from ragkv.evaluation.answering import Reply, replies
from ragkv.evaluation.arms import CONTEXTS, NEIGHBOURS, Arm
from ragkv.evaluation.cases import Case, Place
from ragkv.evaluation.errors import EvaluationError
from ragkv.library.attention import shows
from ragkv.library.measured import Measured
from ragkv.methods import FullPrefill, Method
from ragkv.prompt import PromptTemplate
from ragkv.report import FusedPrompt, FusionReport
from ragkv.store import TieredStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


#: What is raised where a method or a model cannot do what an arm asks for. Others can, so that the run goes on.
REFUSALS = (MethodError, UnsupportedModelError, PromptTooLongError)


#: Documents that are read for a case stay for others until so much is kept.
_KEPT_BYTES = 2 << 30


@dataclass(frozen=True)
class CaseChunks:
    """A case's chunks as the model has read them.

    Attributes:
        chunks: for each of ``arms.CONTEXTS``, and for neighbours where the case has them, the chunk at each place; alone those that
            were retrieved.
    """

    chunks: dict[str, dict[Place, Chunk]]

    def at(self, places: Sequence[Place], context: str) -> list[Chunk]:
        """Chunks in the order of their places."""
        return [self.chunks[context or "document"][place] for place in places]

    def given(self, arm: Arm, case: Case, charged: Mapping[str, float]) -> tuple[list[Chunk], Method]:
        """The chunks that an arm puts together for a case, and the method by which; ``charged`` and errors as for the method."""
        chunks = self.at(arm.places(case), arm.context)
        return chunks, arm.method_for([len(chunk) for chunk in chunks], charged)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one prompt gave, without its cache.

    Attributes:
        ids: the prompt, ``[N]``.
        logits: next-token logits ``[1, V]``.
        reply: what the model says.
        text: the reply as text, with the blanks around it.
        report: of the fusion.
        ttft_ms: from the call to the first token.
    """

    ids: Tensor
    logits: Tensor
    reply: Reply
    text: str
    report: FusionReport
    ttft_ms: float


class Bench:
    """One model, its engine, and the same engine without rotation.

    Args:
        model: as for :class:`ragkv.Engine`.
        tokenizer: cases are texts, so there must be one.
        template: the prompt's parts.
        max_new_tokens: tokens of the longest answer; with 0 nothing is answered, only the next token's distribution is compared.
        instruction: stands between passages and question, so that no document's KV depend on it; asks for short answers, say.
        store: where KV are kept; CPU memory by default.
        measured: what is measured when documents are read, for methods that need it; as far as the model shows it.
        foreign: a text to measure it with, see :class:`ragkv.documents.Documents`.

    Raises:
        UnsupportedModelError: ragkv refuses the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate | None = None,
        *,
        max_new_tokens: int = 32,
        instruction: str = "",
        store: TieredStore | None = None,
        measured: Measured = Measured.SENSITIVITY,
        foreign: str | None = None,
    ):
        if max_new_tokens < 0:
            raise EvaluationError(f"max_new_tokens must be >= 0, got {max_new_tokens}")
        # Nothing is evicted, so no policy needs to know what prefilling costs.
        held = TieredStore(policy="lru") if store is None else store
        asked = _instructed(template or PromptTemplate.default(tokenizer), instruction)
        self.engine: Engine = Engine(model, tokenizer, template=asked, store=held, foreign=foreign)
        if Measured.ATTENDED in measured and not shows(self.engine.decoder):
            measured &= ~Measured.ATTENDED  # an arm that needs it is refused then, and no other
        self.engine.documents.measured = measured
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self.max_new_tokens: int = max_new_tokens
        self.foreign: str | None = foreign
        self.instruction: str = instruction
        self.unrotated: Engine = without_rotation(self.engine)
        self.ends: frozenset[int] = _end_ids(
            model, tokenizer, self.engine.encoder.ids(asked.after_question, trusted=True)
        )
        # Behind ragkv's own plain "Answer:" a word comes with its space; chat templates end where the answer begins.
        plain = template is None and not getattr(tokenizer, "chat_template", None)
        self._before_answer = " " if plain else ""

    def like(self, **changes: Any) -> Bench:
        """Another bench on the same model, with a store of its own.

        Args:
            **changes: ``store`` and ``measured`` as for a new one.
        """
        engine = self.engine
        options = {"max_new_tokens": self.max_new_tokens, "foreign": self.foreign, **changes}
        return Bench(engine.model, self.tokenizer, engine.template, **options)

    def read(self, case: Case, contexts: Collection[str] = (*CONTEXTS, NEIGHBOURS)) -> CaseChunks:
        """Let the model read a case's documents: the retrieved chunks alone; all in their document, also behind its neighbours.

        Args:
            case: what is kept of documents that were read before, for another case perhaps, is not read again.
            contexts: those that are needed; in their document they are read in any case.
        """
        read = {"document": self._documents(case, {})}
        if "alone" in contexts:
            places = list(dict.fromkeys(case.retrieved))
            read["alone"] = dict(zip(places, self.engine.add(list(map(case.text, places))), strict=True))
        if NEIGHBOURS in contexts and case.behind:
            read[NEIGHBOURS] = self._documents(case, dict(enumerate(case.behind)))
        return CaseChunks(read)

    def _documents(self, case: Case, behind: Mapping[int, Sequence[str]]) -> dict[Place, Chunk]:
        """A case's chunks, read in their documents, and these behind passages of others."""
        read = {}
        for document in dict.fromkeys(document for document, _ in case.whole):
            parts = list(case.documents[document])
            for number, chunk in enumerate(self.engine.add_document(parts, behind=behind.get(document, ()))):
                read[document, number] = chunk
        return read

    def release(self, reading: CaseChunks) -> None:
        """Drop what was read where much is kept by now: cases that share documents are asked of what was read once."""
        if sum(self.engine.store.stats().bytes.values()) > _KEPT_BYTES:
            self.forget(reading)

    def forget(self, reading: CaseChunks) -> None:
        """Drop what was read."""
        self.engine.forget([chunk for held in reading.chunks.values() for chunk in held.values()])

    def tokens(self, case: Case, places: Sequence[Place]) -> int:
        """Tokens of the prompt that holds these chunks, its answer not counted."""
        encoder = self.engine.encoder
        chunks = [encoder.chunk(case.text(place)) for place in places]
        return sum(map(len, [encoder.prefix, *chunks, encoder.suffix(case.question)]))

    def room(self, case: Case) -> int:
        """Tokens that the cache keeps for the answer."""
        return max(self.max_new_tokens, len(self.gold_ids(case))) + 1

    def unfit(self, case: Case) -> str:
        """Why a case cannot be asked; empty where it can be."""
        try:
            fitting = self._readable(case) and self.fits(case, case.retrieved)
        except PromptError:
            return "a text of which the tokenizer leaves nothing"
        return "" if fitting else "longer than the model's positions"

    def _readable(self, case: Case) -> bool:
        """Whether every chunk is short enough to be read."""
        encoder, most = self.engine.encoder, self.engine.documents.document_tokens
        front = [sum(len(encoder.chunk(text)) for text in behind) for behind in case.behind] or [0] * len(
            case.documents
        )
        return all(front[place[0]] + len(encoder.chunk(case.text(place))) <= most for place in case.whole)

    def fits(self, case: Case, places: Sequence[Place]) -> bool:
        """Whether the prompt and its answer fit into the model's positions."""
        limit = self.engine.decoder.max_positions
        return limit is None or self.tokens(case, places) + self.room(case) <= limit

    def gold_ids(self, case: Case) -> tuple[int, ...]:
        """Ids of the first gold answer, as it would stand behind the prompt.

        Raises:
            PromptError: it has no tokens.
        """
        answer = next(answer for answer in case.answers if answer.strip())
        ids = self.engine.encoder.ids(self._before_answer + answer)
        if not ids:
            raise PromptError(f"case {case.id}: the answer {answer!r} has no tokens")
        return ids

    def fuse(
        self, chunks: Sequence[Chunk], case: Case, method: Method, rotated: bool = True
    ) -> tuple[FusedPrompt, float]:
        """The prompt, and the milliseconds to its first token."""
        engine = self.engine if rotated else self.unrotated
        begin = perf_counter()
        prompt = engine.fuse(chunks, case.question, method=method, room_tokens=self.room(case))
        int(prompt.logits.argmax())  # waits for the device
        return prompt, (perf_counter() - begin) * 1e3

    def answers(self, prompts: Sequence[tuple[FusedPrompt, float]], case: Case) -> list[Outcome]:
        """What a case's prompts give that :meth:`fuse` made, answered side by side; their caches are used up."""
        steps = self.engine.documents.steps
        fused = [prompt for prompt, _ in prompts]
        found = replies(steps, fused, self.gold_ids(case), self.ends, self.max_new_tokens)
        return [self._outcome(*made, said) for made, said in zip(prompts, found, strict=True)]

    def _outcome(self, prompt: FusedPrompt, ttft_ms: float, said: Reply) -> Outcome:
        text = cut(self.engine.encoder.decode(said.ids), stop_texts(self.engine.template.stop))
        return Outcome(prompt.input_ids[0], prompt.logits, said, text, prompt.report, ttft_ms)

    def warm_up(self, case: Case) -> None:
        """The first passes of a process are slow, and would be charged to whoever comes first."""
        for _ in range(2):
            self.answers([self.fuse([], case, FullPrefill())], case)


def without_rotation(engine: Engine) -> Engine:
    """The same engine, which leaves keys as they were made wherever it places them."""
    twin = copy(engine)
    twin.documents = copy(engine.documents)
    reader = copy(engine.documents.reader)
    twin.documents._readers, twin.documents._others = {reader.anchor_ids: reader}, {}
    reader.decoder = copy(engine.decoder)
    reader.decoder.rotations = [None] * len(engine.decoder.rotations)
    return twin


def _instructed(template: PromptTemplate, instruction: str) -> PromptTemplate:
    if not instruction:
        return template
    if not isinstance(template.before_question, str):
        raise EvaluationError(
            "an instruction stands in front of the template's before_question, which must then be a text"
        )
    return replace(template, before_question=f"{instruction}\n\n{template.before_question}")


def _end_ids(model: Any, tokenizer: PreTrainedTokenizerBase, behind: Sequence[int]) -> frozenset[int]:
    """What ends an answer: the end tokens of model and tokenizer, and the token with which a chat template ends a turn."""
    known = getattr(model.generation_config, "eos_token_id", None)
    listed = known if isinstance(known, list) else [known]
    # The question's turn ends as the answer's does.
    turn = next((i for i in behind if i in tokenizer.all_special_ids), None)
    return frozenset(int(i) for i in (*listed, tokenizer.eos_token_id, turn) if i is not None)

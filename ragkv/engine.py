"""The engine: prompts over stored keys and values, and answers behind them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from threading import Event
from typing import TYPE_CHECKING, Any, Self

from transformers import PreTrainedModel

from ragkv.adding import Adding
from ragkv.advice import Advice, advise
from ragkv.calibration import Calibration, calibrate
from ragkv.errors import OfOneProcess, instance
from ragkv.gate import Gate, Guard
from ragkv.generating import Generating
from ragkv.kernels import Impl
from ragkv.library.documents import Documents
from ragkv.library.given import check_parts
from ragkv.library.measured import Measured
from ragkv.library.paths import Paths
from ragkv.methods import Method, RelevantTokens
from ragkv.methods.words import as_method
from ragkv.model.decoder import Decoder
from ragkv.model.runner import Runner
from ragkv.prompt import Encoder, PromptTemplate, Text
from ragkv.report import EngineStats
from ragkv.scheduling.scheduler import Scheduler
from ragkv.store import TieredStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Engine(
    Adding,
    Generating,
    OfOneProcess,
    instead="make one where it is needed, ragkv.Engine(model, tokenizer, store=ragkv.TieredStore(path))",
):
    """Answers over documents that the model has already read.

    An engine may be used from several threads; the model runs for one of them at a time, a piece of reading or a question each.
    It never changes the model.

    Args:
        model: any transformers decoder with rotary positions, in eval mode.
        tokenizer: ``None`` where everything is given as token ids.
        store: where KV are kept; CPU memory by default.
        method: how prompts are put together, unless a call says otherwise: a method, or its name as on the command line
            (``"auto"``, ``"reuse"``, ``"lego-link:k=16"``); :class:`~ragkv.RelevantTokens` by default.
        template: the prompt's parts; by default from the tokenizer's chat template, or a plain question-answer form.
        context: ``"document"``: chunks of a document are read behind its earlier text; ``"chunk"``: each one alone.
        document_tokens: a longer document is read in windows of at most this many tokens, each behind the last quarter of the
            one before. It bounds the memory of reading. Default: 8192, or the model's positions if fewer.
        piece_tokens: tokens that one forward pass computes; it bounds the memory that the model takes. Default: 512 on a CPU, on
            a GPU what its free memory allows, 8192 at most (docs/kernels.md).
        namespace: chunks stored under another namespace are never found.
        sensitivity: measure how sensitive each token is to the text in front of its document, for methods that need it; every
            document is read twice for that. By default if ``method`` does. Where a single call's method does, what was not
            measured is read again.
        foreign: text or ids of what documents are read behind the second time; by default five short English paragraphs
            (:mod:`ragkv.library.sensitivity`). With another text they are measured anew.
        kernels: which implementation of ``ragkv.kernels`` runs: ``"triton"``, ``"reference"``, or ``"auto"``: Triton on a GPU.
        graphs: run a prompt's few rows, and an answer's tokens, in fixed shapes, recorded as CUDA graphs (docs/kernels.md): by
            default on a GPU where Triton's kernels run. ``True``: elsewhere too, without a GPU as they are; ``False``: nowhere.
        lifetime_s: seconds after which stored KV are a miss, and read again.
        gate: check a share of the prompts against a full prefill, see :class:`~ragkv.Gate`.
        scheduler: says which of the calls that are made at the same time goes first, see :class:`~ragkv.Scheduler`.
        paths: keep what prompts compute, for prompts that begin the same (docs/paths.md): ``True`` in the engine's store, beside
            chunks; or in another one, or in so many bytes of CPU memory. By default nothing is kept.

    Attributes:
        encoder: turns text into ids.
        gate: the gate at work, see :class:`~ragkv.gate.Guard`; ``None`` where there is none.
        scheduler: as given, or one that goes by the order of asking.
        piece_tokens: as given, or as the device's memory allows.
        closing: set when the engine is closed: nobody is answered any more.

    Raises:
        UnsupportedModelError: the model cannot be driven exactly; the message says why.
        ArgumentTypeError: something is not what it must be: a model's name in place of the model, say.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        store: TieredStore | None = None,
        method: Method | str | None = None,
        template: PromptTemplate | None = None,
        context: str = "document",
        document_tokens: int | None = None,
        piece_tokens: int | None = None,
        namespace: str = "",
        sensitivity: bool | None = None,
        foreign: Text | None = None,
        kernels: Impl = "auto",
        graphs: bool | None = None,
        lifetime_s: float = math.inf,
        gate: Gate | None = None,
        scheduler: Scheduler | None = None,
        paths: TieredStore | int | bool = False,
    ):
        self.method: Method = as_method(RelevantTokens() if method is None else method)
        check_parts(model, tokenizer, store, template)
        instance("gate", gate, Gate | None, "a ragkv.Gate, as ragkv.Gate(share=0.01, kl=0.2)")
        instance("scheduler", scheduler, Scheduler | None, "a ragkv.Scheduler")
        instance("kernels", kernels, str, "one of auto, reference, triton")
        instance("graphs", graphs, bool | None, "True, False or None")
        self.model: PreTrainedModel = model
        self.tokenizer: PreTrainedTokenizerBase | None = tokenizer
        self.template: PromptTemplate = template or PromptTemplate.default(tokenizer)
        self.store: TieredStore = TieredStore() if store is None else store
        kept = Paths.of(paths, self.store)  # before the model is probed, which takes a while
        self.runner: Runner = Runner.of(model)
        self.encoder: Encoder = Encoder(self.template, tokenizer, self.runner.decoder(kernels, self.store).vocab_size)
        self.documents: Documents = Documents(
            self.runner,
            self.encoder,
            self.store,
            context=context,
            document_tokens=document_tokens,
            piece_tokens=piece_tokens,
            namespace=namespace,
            measured=Measured.by(self.method, sensitivity=sensitivity),
            foreign=foreign,
            kernels=kernels,
            graphs=graphs,
            lifetime_s=lifetime_s,
            paths=kept,
        )
        self.piece_tokens: int = self.documents.piece_tokens
        self.documents.reader.opening(self.encoder.prefix, "prefix")
        self.gate: Guard | None = None if gate is None else Guard(gate, self.documents)
        self.scheduler: Scheduler = Scheduler() if scheduler is None else scheduler
        self.closing: Event = Event()

    @property
    def paths(self) -> Paths | None:
        """What prompts computed, for those that begin the same; ``None`` where it is not kept."""
        return self.documents.paths

    @property
    def decoder(self) -> Decoder:
        """The model as fusion sees it."""
        return self.runner.decoder(self.documents.kernels)

    def calibrate(self, cases: Iterable[Any], **options: Any) -> Calibration:
        """Find the cheapest method whose loss against full prefill is proved to be under a bound, for ``method="calibrated"``.

        Args:
            cases, **options: and what is raised, see :func:`ragkv.calibration.calibrate`.
        """
        return calibrate(self, cases, **options)

    def advise(self, *, limit_s: float = 10.0, again: bool = False) -> Advice:
        """When reuse pays on this machine with this model: what was measured before, or is measured now and kept beside the KV.

        ``method="auto"`` goes by it from then on; see docs/advise.md.

        Args:
            limit_s: seconds that measuring may take, about.
            again: measure all the same.
        """
        return advise(self.documents, self.method, limit_s, again)

    def refresh(self) -> None:
        """Look at every weight of the model again.

        Weights that were replaced or written in place, and adapters that were switched, merged or loaded are noticed without it.
        Writes that PyTorch does not count are not: call this after ``parameter.data.copy_(...)`` and the like.
        """
        self.runner.refresh()

    def stats(self) -> EngineStats:
        """Requests by namespace, forwards by how many prompts they served, and the store's figures."""
        forwards = dict(sorted(self.documents.steps.sizes.items()))
        paths = None if self.paths is None else self.paths.store.stats()
        return EngineStats(self.scheduler.stats(), forwards, self.store.stats(), paths)

    def close(self) -> None:
        """Close the store, when the prompts that are computed are there.

        Whoever waits for one to begin gets a RagKVError, and so does whoever reads on in a stream; a call of :meth:`generate`
        whose prompt is there goes on. A check of the gate ends at its next piece.
        """
        with ExitStack() as rest:  # whatever of it fails, the others are closed
            rest.callback(self.store.close)
            for held in (self.paths, self.gate):
                if held is not None:
                    rest.callback(held.close)
            self.settle()

    def settle(self) -> None:
        """As :meth:`close`, but that store and model stay as they are: no prompt begins, and what was computed is stored."""
        self.closing.set()
        self.prompting.wait()
        if self.paths is not None:
            self.paths.settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

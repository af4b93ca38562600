"""One prompt from its layout to its logits: the method is asked, stored chunks are placed, the rest is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from math import inf
from time import perf_counter
from types import MappingProxyType

import torch
from torch import Tensor

from ragkv.chunk import Attended, Chunk, ChunkKV
from ragkv.errors import MethodError, ModelChangedError, NonFiniteError, PromptError
from ragkv.fusion.arriving import Arriving
from ragkv.fusion.course import Course
from ragkv.fusion.layout import Layout
from ragkv.fusion.looking import Looking
from ragkv.fusion.narrowing import Narrowing
from ragkv.fusion.passes import Pass
from ragkv.fusion.placement import Placement
from ragkv.fusion.plan import Plan, plan
from ragkv.fusion.timing import Timer, clock
from ragkv.fusion.view import Selection, Variant
from ragkv.kernels import implementation
from ragkv.kernels.upload import sent
from ragkv.lazy import lazy
from ragkv.library.attention import Seen
from ragkv.library.documents import Documents
from ragkv.library.measured import Measured
from ragkv.library.pieces import Known
from ragkv.library.watching import moved_for_this
from ragkv.methods import Method
from ragkv.model.inspection import non_finite
from ragkv.model.rows import Rows
from ragkv.model.steps import Meeting
from ragkv.past import Past
from ragkv.places import Places
from ragkv.report import ChunkReport, FusedPrompt, FusionReport
from ragkv.store import Asking, Batch, Rates


@torch.no_grad()
def fuse(
    documents: Documents,
    layout: Layout,
    method: Method,
    room_tokens: int,
    begin: float,
    past: Past | None = None,
    meeting: Meeting | None = None,
) -> FusedPrompt:
    """Compute what a method asks for over the stored rest.

    Args:
        documents: whose chunks they are.
        layout: the prompt.
        method: chooses.
        room_tokens: room that the cache keeps for an answer.
        begin: ``perf_counter()`` at which the prompt was asked for.
        past: what the layout says is held; its cache is grown in place.
        meeting: of prompts that are computed together.

    Raises:
        RecordError: a record proved damaged; the store has dropped it.
        ModelChangedError: the model is not what it was when this began, or when the past was computed.
        NonFiniteError: the logits are NaN or infinite, where they are on the CPU.
    """
    with ExitStack() as stack:
        one = _Fusing(documents, layout, method, room_tokens, begin, stack, past, meeting)
        layout, steps = one.paths.layout, one.reader.steps
        stack.enter_context(steps.driving(one.cache))
        decoder, timer, layers = one.decoder, one.timer, one.layers
        with timer.stage("select"):
            selection = Selection.of(method.select(one), method)
            layout = one.take(selection.variants)
            work = plan(selection, layout, layers)
        if work.first_stored < layers:
            one.placement.spare(work.whole)
        seen = one.seen(work)
        # Whatever looks into the model must not be there in a forward that others' rows take part in.
        alone = bool(work.checks) or seen is not None
        course = None if alone or meeting is not None else one.course(work, selection.rates)
        if work.first_stored < layers and course is None:
            one.placement.ahead(work.first_stored)
        beside = one.placement.beside(work.first_stored) if one.opened else nullcontext()
        with one.reader.turn() if alone else nullcontext(), beside, timer.stage("compute"):
            together = nullcontext() if alone or meeting is None else meeting.seat(steps)
            forward = steps.forward if alone else partial(one.reader.forward, seat=stack.enter_context(together))
            masses = None if seen is None else seen.masses
            parts = decoder, one.cache, layout, work, one.reader.piece_tokens, timer
            done = (Narrowing if work.checks else Pass)(*parts, forward=forward, masses=masses, course=course)
            logits = done.logits()
        # On a device, decoding looks: it waits for it anyway.
        if logits.device.type == "cpu" and not logits.isfinite().all():
            raise NonFiniteError(f"the prompt's next-token logits are not finite: {non_finite(decoder.dtype)}")
        moved, chunks = moved_for_this(), [placed.chunk for placed in layout.chunks]
        sources = one.placement.sources(moved) if one.opened else ["unused"] * len(chunks)
        levels = one.placement.levels() if one.opened else [""] * len(chunks)
        late = sources.count("late")
        why = selection.why, f"{late} chunks came too slowly and were computed" if late else ""
        report = FusionReport(
            method=selection.name,
            why="; ".join(filter(None, why)),
            attention=done.attention,
            ran=done.ran,
            kernels=implementation(decoder.kernels, decoder.device, decoder.dtype),
            prefix_tokens=layout.chunks_start,
            chunk_tokens=layout.suffix_start - layout.chunks_start,
            suffix_tokens=layout.tokens - layout.suffix_start,
            reused_tokens=one.known,
            read_tokens=sum(len(kv) for kv in one.placement.fresh.values()) if one.opened else 0,
            hits={source: sources.count(source) for source in sorted(set(sources))},
            sources=sources,
            chunks=[
                ChunkReport(chunk.name, chunk.document, chunk.number, len(chunk), source, saved, level)
                for chunk, source, saved, level in zip(chunks, sources, work.saved, levels, strict=True)
            ],
            bytes_read=one.paths.bytes_read + (one.placement.bytes_read(moved) if one.opened else 0),
            budget=done.budget,
            fresh_by_layer=done.fresh,
            looked=one.looked,
            reckoned=dict(selection.reckoned),
            rows=done.rows,
            timer=timer,
        )
        if documents.paths is not None:
            with timer.stage("keep"):
                documents.paths.keep(documents, one.reader, one.paths, one.cache, done, seen)
        return FusedPrompt(layout.ids[None], logits, one.cache, done.rows, report, layout.end, one.reader.fingerprint)


class _Fusing(Looking, Places):
    """What one prompt needs, opened when it is first asked for; answers its view's questions."""

    def __init__(
        self,
        documents: Documents,
        layout: Layout,
        method: Method,
        room_tokens: int,
        begin: float,
        stack: ExitStack,
        past: Past | None,
        meeting: Meeting | None,
    ):
        self.reader = documents.reader
        if past is not None and past.fingerprint != self.reader.fingerprint:
            raise ModelChangedError("the model's weights, adapter or attention have changed since the answer before")
        paths = documents.paths
        self.paths = Known(layout) if paths is None else paths.known(documents, self.reader, layout, method, stack)
        Looking.__init__(self, self.reader, self.paths.layout, room_tokens, None if past is None else past.cache)
        self.known = layout.held
        devices = [self.decoder.device, *(spec.device for spec in self.decoder.specs)]
        self.timer = Timer(clock(devices), begin)
        self._stack, self._meeting = stack, meeting
        self._measured, self._attended = Measured.by(method), method.needs_attended
        self._begin = begin
        keys = [documents.key(placed.chunk, self.reader.space) for placed in layout.chunks]
        Places.__init__(self, documents, self.paths.layout, keys, method.looks, len(self.decoder.layers))
        self._asking, self._spared = Asking(), frozenset[int]()

    @property
    def opened(self) -> bool:
        """Whether stored chunks were asked for."""
        return "placement" in vars(self)

    @lazy
    def placement(self) -> Placement:
        """The prompt's chunks, open in the store; those that are missing are read now."""
        stored = [
            (number, placed.chunk, key)
            for number, (placed, key) in enumerate(zip(self.layout.chunks, self._keys, strict=True))
            if not (placed.path and placed.exact)
        ]
        chunks = {key: chunk for number, chunk, key in stored if number not in self._spared}
        with self.timer.stage("place"):
            store, moved = self._documents.store, moved_for_this()
            batch = self._stack.enter_context(store.read(list(chunks), moved, self._asking))
            lost, known = self._lost(chunks, batch), self.paths.kv()
        items = []
        if lost:
            with self.timer.stage("read"):
                items = list(self._documents.read(self.reader, lost, measured=self._measured))
                self._documents.keep(self.reader, items, chunks)
        fresh = {item.key: item.kv for item in items}
        keys = {chunk: key for _, chunk, key in stored}
        parts = self.decoder, self.cache, self.layout, batch, keys, fresh, self.timer
        return Placement(*parts, paths=known, front=self._open(known))

    def _open(self, paths: dict[bytes, ChunkKV]) -> ChunkKV | None:
        """Put what stands in front of the chunks into the cache: what is known, and what has to be computed.

        Where one known piece is all of it, that is returned, to be placed with the chunks.
        """
        layout = self.layout
        at, front = layout.held, None
        if not layout.held:
            with self.timer.stage("place"):
                front = self.reader.opening(layout.listed(0, layout.opening))
            at = layout.opening
        self.known = at
        if at == layout.chunks_start:
            return front
        with self.timer.stage("place"):
            self.cache.append(front)
        for start, stop, key in (*layout.earlier, (layout.chunks_start, layout.chunks_start, b"")):
            with self.timer.stage("compute"):
                self.reader.run(layout.listed(at, start), self.cache, at)
            with self.timer.stage("place"):
                self.cache.append(paths.get(key))
            self.known += stop - start
            at = stop
        return None

    @property
    def elapsed_s(self) -> float:
        """See :class:`~ragkv.View`."""
        return perf_counter() - self._begin

    def open(
        self, without: frozenset[int], limit_s: float = inf, levels: Mapping[int, str] = MappingProxyType({})
    ) -> None:
        """See :class:`~ragkv.View`.

        All are opened where the method looks at them all, and where what a path settles is never computed.
        """
        self.spared = without
        if self.opened or not self.lossy:
            return
        at = {key: levels[number] for number, key in enumerate(self._keys) if number in levels}
        self._asking = Asking(limit_s, levels=at)
        self._spared = without
        self.placement.spare(without)
        late = {number for number, key in enumerate(self._keys) if key in self._asking.late} - without
        self.placement.spare(late, "late")
        self.spared = self._spared = without | late

    @contextmanager
    def watching(self) -> Iterator[Callable[[Rows], object]]:
        """See :meth:`ragkv.fusion.looking.Looking.watching`."""
        meeting = self._meeting
        with nullcontext() if meeting is None else meeting.seat(self.reader.steps, last=False) as seat:
            yield lambda rows: self.reader.forward(rows, seat)

    @lazy
    def sensitivity(self) -> Tensor:
        """See :class:`~ragkv.View`."""
        batch, fresh = self.placement.batch, self.placement.fresh
        known: dict[bytes, Tensor | None] = dict(zip(batch.keys, batch.sensitivities, strict=True))
        known |= {key: kv.sensitivity for key, kv in fresh.items()}
        chunks = zip(self.layout.chunks, self._keys, strict=True)
        # What is exact under its path is sensitive to nothing; what is computed anyway need not be known.
        found = [
            torch.zeros(len(placed.chunk), dtype=torch.float32, device="cpu")
            if (placed.path and placed.exact) or number in self._spared
            else known[key]
            for number, (placed, key) in enumerate(chunks)
        ]
        measured = [part for part in found if part is not None]
        if len(measured) < len(found):
            raise MethodError(
                "the sensitivity of some chunks was not measured: set needs_sensitivity = True in the method that asks for it"
            )
        return sent(torch.cat([*measured, torch.empty(0, dtype=torch.float32, device="cpu")]), self.layout.ids.device)

    @lazy
    def variants(self) -> list[list[Variant]]:
        """See :class:`~ragkv.View`."""
        batch, fresh, paths = self.placement.batch, self.placement.fresh, self._documents.paths
        known: dict[bytes, Attended | None] = dict(zip(batch.keys, batch.attended, strict=True))
        known |= {key: kv.attended for key, kv in fresh.items()}
        kept = [] if paths is None else paths.variants(self._documents, self.reader, self.paths)
        found = list[list[Variant]]()
        for number, (placed, key) in enumerate(zip(self.layout.chunks, self._keys, strict=True)):
            exact = (placed.path and placed.exact) or number in self._spared
            own = Attended.nothing(len(placed.chunk)) if exact else known[key]
            if own is None:
                raise MethodError(
                    "what some chunks attend to was not measured: set needs_attended = True in the method that asks for it"
                )
            found.append([Variant(own), *(kept[number] if kept else ())])
        return found

    def take(self, variants: Sequence[Variant]) -> Layout:
        """Place the variants that a method chose; the layout that says so."""
        paths, opened = self._documents.paths, len(self.paths.batches)
        if paths is not None and variants:
            self.paths = paths.take(self.paths, variants, self._stack)
        if len(self.paths.batches) > opened:
            self.layout = self.paths.layout
            self.placement.take(self.layout, self.paths.kv(opened))
        return self.layout

    def seen(self, work: Plan) -> Seen | None:
        """Takes what is attended to, where that is kept, or asked for at the checks."""
        layout = self.layout
        kept = bool(self.paths.chunks) and len(work.rows) > layout.tokens - layout.suffix_start
        if not self._attended or not (kept or work.checks):
            return None
        chunks = [placed.chunk for placed in layout.chunks]
        return Seen(self.decoder, chunks, layout.chunks_start, layout.tokens - layout.suffix_start)

    def course(self, work: Plan, rates: Rates | None) -> Course | None:
        """Where chunks come over a network, the rows in the order in which they can be computed meanwhile.

        Not on an accelerator, where layers are placed one by one while the model computes; and not where others wait for this one.
        """
        layout = self.layout
        if work.first_stored == len(self.decoder.layers) or work.context is not None or not layout.ascending:
            return None
        if self._documents.paths is not None or self.placement.by_layer:
            return None
        arriving = Arriving(self.placement, self.timer)
        return Course(layout, work.rows, arriving, rates) if arriving.away() else None

    @lazy
    def check_layer(self) -> int:
        """See :class:`~ragkv.View`."""
        return self.reader.check_layer

    def _lost(self, chunks: dict[bytes, Chunk], batch: Batch) -> list[Chunk]:
        """The chunks that the store does not hold, or not with the sensitivity that is needed.

        A record that is not what its key promises is dropped, and missing.
        """
        missing, broken, again = [], [], Measured.NOTHING
        anchor = len(self.reader.anchor_ids)
        found = zip(batch.tiers, batch.bases, batch.lengths, strict=True)
        for index, ((key, chunk), (tier, base, tokens)) in enumerate(zip(chunks.items(), found, strict=True)):
            if key in self._asking.late:
                continue
            intact = tier is not None and (base, tokens) == (anchor + chunk.offset, len(chunk))
            if tier is not None and not intact and chunk.lineage() is None:
                raise PromptError(
                    f"chunk {chunk.number} of document {chunk.document} says that {chunk.offset} tokens stood in front of it; "
                    "its KV are of another place"
                )
            known = Measured.of(batch, index, self.reader.foreign) if intact else Measured.NOTHING
            if intact and self._measured in known:
                continue
            again |= known
            if tier is not None and not intact:
                broken.append(key)
            missing.append(chunk)
        if broken:
            self._documents.store.remove_many(broken)
        self._measured |= again  # what was known of them is not lost
        return missing

"""One prompt from its layout to its logits: the method is asked, stored chunks are placed, the rest is computed."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from functools import partial
from weakref import ReferenceType, ref

import torch

from ragkv.errors import NonFiniteError
from ragkv.fusing import Fusing
from ragkv.fusion.layout import Layout
from ragkv.fusion.narrowing import Narrowing
from ragkv.fusion.passes import Pass
from ragkv.fusion.plan import plan
from ragkv.fusion.view import Selection
from ragkv.kernels import implementation
from ragkv.library.documents import Documents
from ragkv.library.watching import moved_for_this
from ragkv.methods import Method
from ragkv.model.cache import FusedCache
from ragkv.model.inspection import non_finite
from ragkv.model.steps import Meeting, Steps
from ragkv.past import Past
from ragkv.report import ChunkReport, FusedPrompt, FusionReport


@torch.no_grad()
def fuse(
    documents: Documents,
    layout: Layout,
    method: Method,
    room_tokens: int,
    begin: float,
    past: Past | None = None,
    meeting: Meeting | None = None,
    behind: ExitStack | None = None,
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
        behind: until this is closed the cache may stay where fixed steps find it: it is the answer's. By default it leaves at once.

    Raises:
        RecordError: a record proved damaged; the store has dropped it.
        ModelChangedError: the model is not what it was when this began, or when the past was computed.
        NonFiniteError: the logits are NaN or infinite, where they are on the CPU.
    """
    with ExitStack() as stack:
        one = Fusing(documents, layout, method, room_tokens, begin, stack, past, meeting)
        layout, steps = one.paths.layout, one.reader.steps
        (stack if behind is None else behind).callback(_leave, steps, ref(one.cache))
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
            chunk_tokens=layout.chunk_tokens,
            suffix_tokens=layout.suffix_tokens,
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
        prompt = FusedPrompt(layout.ids[None], logits, one.cache, done.rows, report, layout.end, one.reader.fingerprint)
        prompt.said = None if layout.said is None else layout.said[None]
        return prompt


def _leave(steps: Steps, cache: ReferenceType[FusedCache]) -> None:
    """A cache that is still of use has memory of its own again."""
    alive = cache()
    if alive is not None:
        steps.leave(alive)

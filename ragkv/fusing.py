"""What a method is shown of a prompt: where its chunks lie, before it is made; all of it, in the making."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from math import inf
from time import perf_counter
from types import MappingProxyType

import torch
from torch import Tensor

from ragkv.chunk import Attended, Chunk, ChunkKV
from ragkv.errors import MethodError, ModelChangedError, PromptError
from ragkv.fusion.arriving import Arriving
from ragkv.fusion.course import Course
from ragkv.fusion.layout import Layout
from ragkv.fusion.looking import Looking
from ragkv.fusion.placement import Placement
from ragkv.fusion.plan import Plan
from ragkv.fusion.timing import Timer, clock
from ragkv.fusion.view import Variant, View
from ragkv.kernels.upload import sent
from ragkv.lazy import lazy
from ragkv.library.attention import Seen
from ragkv.library.documents import Documents
from ragkv.library.measured import Measured
from ragkv.library.pieces import Known
from ragkv.library.rates import known_rates
from ragkv.library.reading import Reader
from ragkv.library.watching import moved_for_this
from ragkv.methods import Method
from ragkv.model.cache import FusedCache
from ragkv.model.rows import Rows
from ragkv.model.steps import Meeting
from ragkv.past import Past
from ragkv.store import Asking, Batch, Rates


class Places(View):
    """A view that knows where the prompt's chunks lie.

    Args:
        documents: whose chunks they are.
        layout: the prompt.
        keys: of its chunks' KV.
        looks: the method that is asked looks at what is stored.
    """

    def __init__(self, documents: Documents, layout: Layout, keys: Sequence[bytes], looks: bool = False):
        super().__init__(layout, len(documents.runner.decoder(documents.kernels).layers))
        self._documents, self._keys, self._looks = documents, keys, looks

    @lazy
    def rates(self) -> Rates | None:
        """See :class:`View`."""
        return known_rates(self._documents)

    @lazy
    def check_layer(self) -> int:
        """See :class:`View`; the first that there may be as long as nobody has run the model to find it out."""
        return vars(self._documents.reader).get("check_layer", 1)

    @property
    def lossy(self) -> bool:
        """See :class:`View`."""
        # What is kept of a path is exact, and so must be what it was computed behind.
        return not self._looks and self._documents.paths is None

    @lazy
    def tiers(self) -> Sequence[str | None]:
        """See :class:`View`."""
        rates, layout = self.rates, self.layout
        limit_s = inf if rates is None else rates.patience_s(layout.tokens - layout.held, layout.held)
        moved, places = moved_for_this(), self._documents.store.where(self._keys, limit_s)
        chunks = zip(layout.chunks, self._keys, strict=True)
        return ["cpu" if p.path else moved[key].tier if key in moved else places.get(key) for p, key in chunks]


class Fusing(Looking, Places):
    """A prompt in the making, and the view of it: what it needs is opened when it is first asked for.

    Args:
        documents, layout, method, room_tokens, begin, past, meeting: as of :func:`ragkv.fuse.fuse`.
        stack: closed when the prompt is there.

    Attributes:
        reader: the model as it is now.
        paths: what was computed of the prompt before.
        timer: of its stages.
        known: tokens of the prefix whose KV were there already.
    """

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
        self.reader: Reader = documents.reader
        if past is not None and past.fingerprint != self.reader.fingerprint:
            raise ModelChangedError("the model's weights, adapter or attention have changed since the answer before")
        paths = documents.paths
        self.paths: Known = (
            Known(layout) if paths is None else paths.known(documents, self.reader, layout, method, stack)
        )
        graphs, layout = self.reader.steps.graphs, self.paths.layout
        if past is not None:
            cache: FusedCache | None = past.taken()
        elif graphs is not None and meeting is None:
            cache = graphs.cache(layout.tokens, layout.tokens + room_tokens)
        else:
            cache = None
        Looking.__init__(self, self.reader, layout, room_tokens, cache)
        self.known: int = layout.held
        devices = [self.decoder.device, *(spec.device for spec in self.decoder.specs)]
        self.timer: Timer = Timer(clock(devices), begin)
        self._stack, self._meeting = stack, meeting
        self._measured, self._attended = Measured.by(method), method.needs_attended
        self._begin = begin
        keys = [documents.key(placed.chunk, self.reader.space) for placed in layout.chunks]
        Places.__init__(self, documents, self.paths.layout, keys, method.looks)
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
        parts = [_zeros(0)]
        for number, key in enumerate(self._keys):
            part = _zeros(len(self.layout.chunks[number].chunk)) if self._sure(number) else known[key]
            if part is None:
                raise MethodError(
                    "the sensitivity of some chunks was not measured: set needs_sensitivity = True in the method that asks for it"
                )
            parts.append(part)
        return sent(torch.cat(parts), self.layout.ids.device)

    @lazy
    def variants(self) -> list[list[Variant]]:
        """See :class:`~ragkv.View`."""
        batch, fresh, paths = self.placement.batch, self.placement.fresh, self._documents.paths
        known: dict[bytes, Attended | None] = dict(zip(batch.keys, batch.attended, strict=True))
        known |= {key: kv.attended for key, kv in fresh.items()}
        kept = [] if paths is None else paths.variants(self._documents, self.reader, self.paths)
        found = list[list[Variant]]()
        for number, (placed, key) in enumerate(zip(self.layout.chunks, self._keys, strict=True)):
            own = Attended.nothing(len(placed.chunk)) if self._sure(number) else known[key]
            if own is None:
                raise MethodError(
                    "what some chunks attend to was not measured: set needs_attended = True in the method that asks for it"
                )
            found.append([Variant(own), *(kept[number] if kept else ())])
        return found

    def _sure(self, number: int) -> bool:
        """Whether nothing that is stored of a chunk is looked at: it is exact under its path, or computed whole."""
        placed = self.layout.chunks[number]
        return bool(placed.path and placed.exact) or number in self._spared

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
        kept = bool(self.paths.chunks) and len(work.rows) > layout.suffix_tokens
        if not self._attended or not (kept or work.checks):
            return None
        chunks = [placed.chunk for placed in layout.chunks]
        return Seen(self.decoder, chunks, layout.chunks_start, layout.suffix_tokens)

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


def to_load(documents: Documents, layout: Layout, method: Method) -> list[bytes]:
    """The keys of what a prompt would load, wherever that lies."""
    keys = [documents.key(placed.chunk) for placed in layout.chunks]
    spared = method.spares(Places(documents, layout, keys, method.looks))
    return [key for number, key in enumerate(keys) if number not in spared]


def _zeros(tokens: int) -> Tensor:
    return torch.zeros(tokens, dtype=torch.float32, device="cpu")

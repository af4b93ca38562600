"""Forwards in fixed shapes: the same memory and the same sizes every time, so that a GPU replays what it has recorded once.

A step of decoding, or a pass over a few rows, is launched by Python kernel by kernel, which takes longer than the GPU works on it.
Here rows are filled up to a bucket, and the prompt's cache stands in a room (:mod:`ragkv.model.rooms`), over all of which selective
attention looks by spans: one graph serves whatever fits. On a CPU the same steps run as they are.

S rows, C slots of a room, L layers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ragkv.errors import UnsupportedModelError
from ragkv.kernels import implementation
from ragkv.model.cache import FusedCache
from ragkv.model.capture import Capture, CudaCapture, Cut, Replay
from ragkv.model.decoder import Decoder
from ragkv.model.kernel_attention import Scores, SpanBuilder, kernel_attention
from ragkv.model.masks import for_model
from ragkv.model.rooms import Room, Rooms
from ragkv.model.rows import Rows
from ragkv.model.syncs import HostSyncError, no_syncs

_MOST_ROWS = 2048  # from here on a GPU works longer than Python launches
_MOST_GRAPHS = 32
_LAYERS = 2  # of one graph, where layers are placed while others compute


def row_bucket(rows: int) -> int:
    """A number of rows to fill up to: few are filled up to a power of two, many by an eighth at most."""
    power = 1 << (rows - 1).bit_length()
    step = max(16, power // 16)
    return power if rows <= 16 else -(-rows // step) * step


class Graphs:
    """Runs rows of one prompt: in fixed shapes where it can, else as :meth:`Decoder.forward` does. One thread at a time.

    Args:
        decoder: the model, with :attr:`Decoder.spans`.
        capture: makes graphs; ``None``: fixed steps run as they are.
        mark: what changes whenever a graph would read the wrong memory, or a model that is not this one.

    Attributes:
        why: why nothing runs in fixed shapes any more; empty as long as it does.
        early: a token's step is launched before the host knows the token, so that the device need not wait for the host.
    """

    def __init__(self, decoder: Decoder, capture: Capture | None, mark: Callable[[], object]):
        self.why: str = ""
        self.early: bool = capture is not None
        self._decoder, self._capture, self._mark = decoder, capture, mark
        self._marked: object = None
        self._hooks: list[dict[int, Any]] = []  # of all modules
        self._fixed: OrderedDict[tuple[Room, int, int, bool, bool], _Fixed] = OrderedDict()
        self._rooms = Rooms(self._drop, self._affords, decoder.kernels)

    @classmethod
    def of(cls, decoder: Decoder, wanted: bool | None, mark: Callable[[], object]) -> Graphs | None:
        """Those of a model; ``None`` where there shall be none.

        Args:
            decoder: the model.
            wanted: ``None``: where the model is on a CUDA device and its attention runs as Triton's kernel.
            mark: as above.

        Raises:
            UnsupportedModelError: they were asked for, and the model's attention is not selective attention.
        """
        cuda = decoder.device.type == "cuda"
        if wanted is None:
            ran = implementation(decoder.kernels, decoder.device, decoder.dtype)
            wanted = cuda and decoder.spans is not None and ran == "triton"
        if not wanted:
            return None
        if decoder.spans is None:
            raise UnsupportedModelError(
                "graphs=True was asked for, and the model's attention runs with masks here, of another shape for every prompt: "
                "leave it out; or give kernels='reference', on a GPU 'triton', which not every model allows"
            )
        return cls(decoder, CudaCapture(decoder.device) if cuda else None, mark)

    def forward(self, rows: Rows) -> Tensor:
        """As :meth:`Decoder.forward`; ``rows.ran`` says how."""
        self._look()
        shown = self._shown(rows)
        why = self.why if shown is None else self._hindrance()
        room = None if shown is None or why else self._enter(rows, *shown)
        if room is None or shown is None:
            why = why or self.why or ("" if shown is None else "no room is free, nor memory for one")
            rows.ran = f"eager: {why}" if why else "eager"
            return self._decoder.forward(rows)
        fixed = self._step(room, rows)
        try:
            rows.ran, logits = fixed.run(rows, self._capture)
        except Exception as error:
            if fixed.placing:
                raise  # a layer could not be placed, for which no graph is to blame
            why = _reason(error)
        if why:  # behind the error, which holds what was computed
            return self._instead(rows, why)
        rows.attention = fixed.attention
        if rows.cache.writer is None:
            rows.cache.set_length(shown[1])
        if rows.scores is not None:
            rows.scores.every = fixed.scores(shown[1])
        return logits

    def _instead(self, rows: Rows, why: str) -> Tensor:
        """Rows whose step failed, run as they are; so are all from then on, unless they fail too and the step is not to blame."""
        self._forget()
        logits = self._decoder.forward(rows)
        self.why, rows.ran = why, f"eager: {why}"
        return logits

    def cache(self, slots: int, capacity: int) -> FusedCache | None:
        """A new cache where fixed steps find it, of which so many slots will be written before they run; ``None`` where there is no
        place for one just now.
        """
        changed = self._mark() != self._marked  # rooms are of the model as it was
        if changed or self.why or (self._capture is not None and not self._capture.usable()):
            return None
        return self._rooms.born(slots, capacity, self._decoder.specs)

    def leave(self, cache: FusedCache) -> None:
        """Give a cache memory of its own again; what runs over it next moves it in anew."""
        self._rooms.leave(cache, self._settle_apart)

    def _shown(self, rows: Rows) -> tuple[int, int] | None:
        """How many slots hold something, and how many will; ``None`` where rows see no run of slots, or stand in others than their
        positions say.
        """
        if rows.limited or rows.masses is not None or not 0 < len(rows) <= _MOST_ROWS:
            return None
        behind = rows.held, rows.held + len(rows)
        if isinstance(rows.masks, SpanBuilder) and not rows.masks.everything:
            if rows.cache.writer is not None:
                return rows.masks.keys, rows.masks.keys
            return behind if rows.masks.keys == behind[1] else None  # a look
        return behind if rows.masks is None and rows.first == rows.held else None

    def _hindrance(self) -> str:
        """Why nothing runs in fixed shapes just now; empty if it may."""
        if self.why:
            return self.why
        if any(self._hooks):
            return "hooks are in the model, and a graph would not call them"
        if self._capture is not None and not self._capture.usable():
            return "its thread is on another stream than the default one"
        return ""

    def _enter(self, rows: Rows, held: int, needed: int) -> Room | None:
        """The room where the rows' cache is, moved in if it was not."""
        cache = rows.cache
        room = self._rooms.find(cache)
        if room is not None and not (room.hosts(cache) and needed < room.slots):
            room.leave(cache)
            room = None
        if room is None:
            room_for = max(needed, cache.layers[0].key_room.shape[2])
            try:
                room = self._rooms.enter(cache, held, room_for, self._decoder.specs)
            except torch.OutOfMemoryError:
                self.why = "there was no memory for a second cache"
                self._forget()
        if room is not None:
            room.used = max(room.used, needed)
        return room

    def _step(self, room: Room, rows: Rows) -> _Fixed:
        bucket = min(row_bucket(len(rows)), _MOST_ROWS)
        keep = rows.wanted if rows.wanted < 2 else bucket
        key = room, bucket, keep, rows.scores is not None, rows.cache.before is not None
        if key not in self._fixed:
            self._fixed[key] = _Fixed(self._decoder, *key)
        self._fixed.move_to_end(key)
        if len(self._fixed) > _MOST_GRAPHS:
            self._settle()
            self._fixed.popitem(last=False)
        return self._fixed[key]

    def _look(self) -> None:
        """Begin anew where the model was changed."""
        mark = self._mark()
        if mark == self._marked:
            return
        self._forget()
        self.why, self._marked = "", mark
        modules = list(self._decoder.model.modules())
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        devices = {self._decoder.device, *(spec.device for spec in self._decoder.specs)}
        if self._decoder.spans is None:
            self.why = "its attention runs with masks"
        elif len(devices) > 1 or any(hasattr(module, "_hf_hook") for module in modules):
            self.why = "its weights are on several devices, or are brought there when they are needed"

    def _forget(self) -> None:
        self._settle()
        self._fixed.clear()
        self._rooms.forget()

    def _drop(self, room: Room) -> None:
        self._settle()
        for key in [key for key in self._fixed if key[0] is room]:
            del self._fixed[key]

    def _affords(self, size: int) -> bool:
        """A room takes no more than half of what is left: others need memory too, and had it without."""
        return self._capture is None or 2 * size <= self._capture.free_bytes()

    def _settle_apart(self) -> None:
        """Who leaves on another stream than that of the next one to enter is waited for."""
        if self._capture is not None and not self._capture.usable():
            self._capture.settle()

    def _settle(self) -> None:
        if self._capture is not None and self._fixed:
            self._capture.settle()


def _go_on(layer: int) -> None:
    """Nothing is placed in between."""


class _CaptureError(Exception):
    """A step could not be captured."""


def _reason(error: Exception) -> str:
    if isinstance(error, HostSyncError):
        return f"the model waits for the device ({error})"
    if isinstance(error, torch.OutOfMemoryError):
        return "there was no memory for graphs"
    what = "its graph could not be captured" if isinstance(error, _CaptureError) else "its step in fixed shapes failed"
    return f"{what}: {str(error).partition(chr(10))[0]}"


class _Fixed:
    """One step in fixed shapes: its first run compiles kernels and shows whether it waits for the device.

    Rows stand at the end; those in front of them repeat the first one, and write to the room's spare slot.

    Args:
        decoder: the model.
        room: where the cache is.
        rows: S.
        keep: rows at the end whose logits are wanted.
        scored: what layers attend to is summed, and kept until the next run.
        parted: layers are placed while those in front of them compute, so that a few at a time are a graph.

    Attributes:
        attention: the attention implementation that ran.
        placing: layers are placed just now.
    """

    def __init__(self, decoder: Decoder, room: Room, rows: int, keep: int, scored: bool, parted: bool):
        self._decoder, self._room, self._keep, self._parted = decoder, room, keep, parted
        with torch.inference_mode(False):
            self._given = torch.zeros(3, rows, dtype=torch.long, device=decoder.device)  # ids, positions and slots
            weights = torch.zeros(rows, dtype=torch.float32, device=decoder.device)
        self._scores: Scores | None = Scores(weights) if scored else None
        self.attention: str = ""
        self.placing: bool = False
        self._replay: Replay | None = None
        self._tried = False

    def run(self, rows: Rows, capture: Capture | None) -> tuple[str, Tensor]:
        """How it ran, and the logits ``[W, V]`` that are wanted."""
        self.placing = False
        self._fill(rows)

        def place(layer: int) -> None:
            if rows.cache.before is not None:
                self.placing = True
                rows.cache.before(min(layer + _LAYERS, len(self._decoder.layers)) - 1)
                self.placing = False

        if self._replay is None:
            place(len(self._decoder.layers))  # all of them: what brings them may wait, and must not be captured
        if not self._tried:
            with no_syncs(self._decoder.device):
                out = self._body(_go_on)
            self._tried = True
        elif capture is None:
            out = self._body(_go_on)
        else:
            if self._replay is None:
                self._replay = self._captured(capture)
            out = self._replay(place)
            return "graph", out[len(out) - rows.wanted :].clone()  # the next graph may write there
        return "fixed", out[len(out) - rows.wanted :]

    def scores(self, slots: int) -> Tensor:
        """What the last run's rows attended to ``[L, N]``, of so many slots."""
        assert self._scores is not None
        return torch.stack(self._scores.layers)[:, :slots]  # a copy: the next run writes anew

    def _captured(self, capture: Capture) -> Replay:
        try:
            return capture(self._body)
        except Exception as error:
            raise _CaptureError(str(error)) from error

    def _fill(self, rows: Rows) -> None:
        given, front = self._given, self._given.shape[1] - len(rows)
        given[:, front:] = torch.stack([rows.ids, rows.positions, rows.positions])
        given[:, :front] = given[:, front : front + 1].clone()
        given[2, :front] = self._room.spare
        if self._scores is not None and rows.scores is not None:
            self._scores.weights[:front] = 0.0
            self._scores.weights[front:] = rows.scores.weights

    @torch.inference_mode(False)  # in it operations come whole, and what they do within is not seen
    @torch.no_grad()
    def _body(self, cut: Cut) -> Tensor:
        decoder, room = self._decoder, self._room
        ids, positions, slots = self._given
        assert decoder.spans is not None
        placed = 0 if self._parted else len(decoder.layers)

        def write(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal placed
            if layer >= placed:
                cut(layer)
                placed = layer + _LAYERS
            return room.cache.scatter(layer, keys, values, slots, room.slots, decoder.kernels)

        if self._scores is not None:
            self._scores.layers.clear()
        spans = SpanBuilder(decoder.spans, positions, 0)  # never all there are, so never without spans
        attention = kernel_attention(decoder.config, decoder.device, decoder.dtype, decoder.kernels, self._scores)
        with attention as self.attention, room.cache.writing(write):
            mask = for_model(spans, decoder.config)
            if self._keep:
                return decoder.step(ids, positions, room.cache, mask, rows=self._keep)
            return decoder.run(ids, positions, room.cache, mask)

"""What a model is to ragkv: its layers, rotations and attention rules; and which models are refused.

Nothing here knows a model by name. A model is asked what it does: where its decoder layers are, what it writes into a cache,
how its keys turn, which keys its layers see.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ragkv.errors import UnsupportedModelError
from ragkv.kernels import WIDEST_HEAD, Impl, implementation
from ragkv.model.attending import Masses, attending
from ragkv.model.attention import eager_attention, fusion_attention, grouped
from ragkv.model.cache import FusedCache, LayerSpec
from ragkv.model.inspection import decoder_layers, non_finite, refuse_by_config, refuse_state, unwrapped
from ragkv.model.kernel_attention import SpanBuilder, SpanRule, kernel_attention, serves, span_rules
from ragkv.model.linear import few_rows
from ragkv.model.masks import MaskBuilder, Rule, for_model, layer_rules
from ragkv.model.rope import Probe, Rotation, Tolerance, probe_rotations, relative_error
from ragkv.model.rows import Rows
from ragkv.model.traits import Traits
from ragkv.model.turns import Turns, turns

_PROBE_TOKENS = 8
_STORED = torch.float32, torch.bfloat16, torch.float16
_CHECK_TOKENS = 24
_SHAKE = 1e-5  # an exact model answers it by errors of its size; one that rounds coarsely, by its rounding


class Decoder:
    """A transformers decoder as fusion sees it.

    Attributes:
        model: the model itself, never changed.
        config: its text config.
        layers: the decoder layers.
        specs: shape, dtype and device of every layer's keys and values.
        rotations: how every layer's keys turn with their position; ``None`` where they carry none.
        rules: which keys every layer's queries may see.
        kernels: which implementation of ``ragkv.kernels`` was asked for.
        spans: the rules as selective attention takes them; ``None`` where scattered queries get masks instead.
        max_positions: positions of the longest prompt, or ``None``.
        vocab_size: ids are below it.
        keeps_last: logits may be asked for of the last row alone.
        probes: how often it was found out what the model does.

    Raises:
        UnsupportedModelError: by name of the reason, when the model cannot be driven exactly.
    """

    def __init__(self, model: PreTrainedModel, kernels: Impl = "auto", known: Traits | None = None):
        self.model: PreTrainedModel = unwrapped(model)
        self.kernels = kernels
        self.config: PreTrainedConfig = self.model.config.get_text_config(decoder=True)
        self.turns: Turns = turns(self.config)
        self.probes: int = 0
        self.probe(known)

    def probe(self, known: Traits | None = None) -> None:
        """Find out what the model does, once more where it was changed in more than its weights.

        Args:
            known: what was found of just this model before.
        """
        self.probes += 1
        refuse_by_config(self.config)
        refuse_state(self.model)
        embeddings = self.model.get_input_embeddings()
        self.layers: nn.ModuleList = decoder_layers(self.model, self.config.num_hidden_layers)
        self.vocab_size: int = embeddings.weight.shape[0]
        self.device: torch.device = _device(embeddings)
        self.backbone: nn.Module = getattr(self.model, self.model.base_model_prefix, self.model)
        self.keeps_last: bool = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.rules: list[Rule] = layer_rules(self.config, len(self.layers), self.device)
        self.max_positions: int | None = getattr(self.config, "max_position_embeddings", None)
        if known is None:
            with self.turns:
                self._try()
        else:
            self.specs: list[LayerSpec] = known.specs
            self.rotations: list[Rotation | None] = known.rotations
            self.max_positions = known.max_positions
            self.dtype: torch.dtype = self.specs[0].dtype
            self.spans = self._span_rules() if known.spans else None

    @property
    def traits(self) -> Traits:
        """What was found."""
        return Traits(self.specs, self.rotations, self.max_positions, self.spans is not None)

    def _try(self) -> None:
        start = self._begin()
        self.specs = [
            LayerSpec(k.shape[0], k.shape[2], v.shape[2], k.dtype, k.device)
            for k, v in zip(start.keys, start.values, strict=True)
        ]
        for spec in self.specs:
            if spec.dtype not in _STORED:
                raise UnsupportedModelError(
                    f"the model's keys and values are {spec.dtype}, and none but float32, bfloat16 and float16 can be stored: "
                    "load it with dtype=torch.float32"
                )
        self.dtype = self.specs[0].dtype
        tolerance = self.tolerance()
        self.rotations, movable = probe_rotations(self.model, start, self._run_at, self.max_positions, tolerance)
        self.max_positions = movable or self.max_positions
        self.spans = self._span_rules()
        self._check_scattered(tolerance)

    @property
    def attention(self) -> str:
        """The attention implementation that the model was loaded with."""
        return self.config._attn_implementation

    def cache(self, capacity: int) -> FusedCache:
        """An empty cache with room for ``capacity`` tokens."""
        return FusedCache(self.specs, capacity)

    @torch.no_grad()
    def read(self, ids: Tensor, cache: FusedCache, start: int) -> Tensor:
        """Run ``ids [S]`` behind what the cache holds, for their keys and values; no logits are computed.

        Args:
            ids: token ids on the model's device.
            cache: appended to.
            start: position of the first token.

        Returns:
            The last hidden states ``[S, hidden size]``.
        """
        return self.run(ids, self._span(start, len(ids))[0], cache)

    @torch.no_grad()
    def run(self, ids: Tensor, positions: Tensor, cache: FusedCache, mask: Any = None) -> Tensor:
        """Run ``ids [S]`` at ``positions [S]`` and return the last hidden states ``[S, hidden size]``."""
        return self._out(self.backbone, ids, positions, cache, mask)[0][0]

    @torch.no_grad()
    def step(self, ids: Tensor, positions: Tensor, cache: FusedCache, mask: Any = None, rows: int = 1) -> Tensor:
        """Run ``ids [S]`` at ``positions [S]`` and return the next-token logits ``[rows, V]`` of the last ones."""
        keep = {"logits_to_keep": rows} if self.keeps_last else {}
        return self._out(self.model, ids, positions, cache, mask, **keep).logits[0, -rows:]

    def _out(self, module: nn.Module, ids: Tensor, positions: Tensor, cache: FusedCache, mask: Any, **more: int) -> Any:
        with self.turns, few_rows(len(ids), self.device, self.model.dtype):
            return module(
                input_ids=ids[None],
                position_ids=positions[None],
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                **more,
            )

    def forward(self, rows: Rows) -> Tensor:
        """Run rows of one prompt; returns the next-token logits ``[W, V]`` of the last ones, as many as are wanted."""
        with self._attention_of(rows) as rows.attention:
            mask = None if rows.masks is None else for_model(rows.masks, self.config)
            if rows.wanted:
                return self.step(rows.ids, rows.positions, rows.cache, mask, rows=rows.wanted)
            return self.run(rows.ids, rows.positions, rows.cache, mask)[:0]

    def _attention_of(self, rows: Rows) -> AbstractContextManager[str]:
        if rows.watch is not None:
            return kernel_attention(self.config, self.device, self.dtype, self.kernels, rows.watch)
        return self.fusion_attention(scattered=rows.masks is not None, limited=rows.limited, masses=rows.masses)

    def masks(
        self, positions: Tensor, keys: int, key_positions: Tensor | None = None, open_keys: Tensor | None = None
    ) -> MaskBuilder | SpanBuilder:
        """Masks for scattered queries at ``positions [S]`` over the keys in N slots, or what stands in their place.

        Args:
            positions: of the queries.
            keys: N.
            key_positions: ``[N]`` position of the key in each slot, where that is not the slot itself; only masks can say so.
            open_keys: ``[S, N]`` false where a query may not see a key, whatever the model's rule says; only masks can say so.
        """
        if self.spans is not None and open_keys is None and key_positions is None:
            return SpanBuilder(self.spans, positions, keys)
        if key_positions is None:
            key_positions = torch.arange(keys, device=positions.device)
        additive = self.attention != "sdpa" or grouped(self.model, self.config)
        return MaskBuilder(self.rules, positions, key_positions, self.model.dtype, additive, open_keys)

    @contextmanager
    def fusion_attention(
        self, *, scattered: bool, limited: bool = False, masses: Masses | None = None
    ) -> Iterator[str]:
        """The attention of one pass, which is one turn; yields its name.

        Selective attention where it can run, else :mod:`ragkv.model.attention`'s.

        Args:
            scattered: queries do not stand one behind the other at the end.
            limited: what a query sees is no run of slots: keys are hidden from it, or positions do not run evenly with the slots.
            masses: takes what is attended to.
        """
        if scattered and self.spans is not None and not limited:
            switched = kernel_attention(self.config, self.device, self.dtype, self.kernels)
        else:
            switched = fusion_attention(self.model, self.config, scattered)
        with switched as name, attending(self.layers, self.config, masses):
            yield name

    def _span_rules(self) -> list[SpanRule] | None:
        ran = implementation(self.kernels, self.device, self.dtype)
        if self.kernels == "auto" and ran == "reference":
            return None  # sdpa with masks is faster than selective attention's reference
        if self.kernels == "auto" and max(max(spec.key_dim, spec.value_dim) for spec in self.specs) > WIDEST_HEAD:
            return None
        rules = span_rules(self.rules, self.device) if serves(self.model, self.config) else None
        if rules is None and self.kernels != "auto":
            raise UnsupportedModelError(
                f"kernels={self.kernels!r} was asked for, and this model's attention is none that the kernel computes: use "
                "kernels='auto'"
            )
        return rules

    def _span(self, start: int, tokens: int) -> Tensor:
        return torch.arange(start, start + tokens, device=self.device)[None]

    def tolerance(self) -> Tolerance:
        """At which relative errors two runs of the model count as equal."""
        return Tolerance(self._noise)

    def random_ids(self, tokens: int) -> Tensor:
        """``[S]`` ids to try the model with, always the same."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, self.vocab_size, (tokens,), generator=generator, device="cpu").to(self.device)

    def _begin(self) -> Probe:
        """The probe's tokens at position 0, over a cache that only looks at what is written."""
        recorder = _Recorder()
        try:
            hidden = self.read(self.random_ids(_PROBE_TOKENS), recorder, 0)
        except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
            raise UnsupportedModelError(f"the model does not run over a plain key-value cache: {error}") from error
        if sorted(recorder.seen) != list(range(len(self.layers))):
            raise UnsupportedModelError(
                f"the model wrote keys and values for layers {sorted(recorder.seen)} of {len(self.layers)}: recurrent layers, or "
                "layers that share another's cache, are not supported"
            )
        pairs = [recorder.seen[layer] for layer in range(len(self.layers))]
        return Probe([keys[0] for keys, _ in pairs], [values[0] for _, values in pairs], hidden)

    def _run_at(self, offset: int) -> Probe:
        cache = self.cache(_PROBE_TOKENS)
        for layer in cache.layers:
            layer.dropped = offset  # some models take positions from the cache's length besides position_ids
        # Flex attention compiles a mask for the claimed length, which fails on a CPU; how keys turn does not hang on it.
        plain = nullcontext() if self.attention in ("eager", "sdpa") else eager_attention(self.model, self.config)
        try:
            with plain:
                hidden = self.read(self.random_ids(_PROBE_TOKENS), cache, offset)
        except (IndexError, RuntimeError) as error:
            raise UnsupportedModelError(
                f"the model cannot run at position {offset}: positions from a table, or ALiBi ({error})"
            ) from error
        return Probe([layer.keys[0] for layer in cache.layers], [layer.values[0] for layer in cache.layers], hidden)

    @torch.no_grad()
    def _noise(self) -> float:
        """How far apart passes are that an exact model computes alike: in one piece, in several, and of all but the same input."""
        tokens = min(_CHECK_TOKENS, self.max_positions or _CHECK_TOKENS)
        ids, everywhere = self.random_ids(tokens), self._span(0, tokens)[0]
        seeded = torch.Generator().manual_seed(0)

        def shaken(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            drawn = torch.randn(out.shape, generator=seeded, dtype=torch.float32, device="cpu")
            return out * (1 + _SHAKE * drawn).to(out)

        def run(*ends: int) -> list[Tensor]:
            cache = self.cache(tokens)
            for begin, end in pairwise((0, *ends, tokens)):
                logits = self.step(ids[begin:end], everywhere[begin:end], cache)
            return [*(part for layer in cache.layers for part in (layer.keys, layer.values)), logits]

        want, others = run(), [run(1, tokens // 4), run(tokens // 2)]
        hook = self.model.get_input_embeddings().register_forward_hook(shaken)
        try:
            others += [run(), run()]
        finally:
            hook.remove()
        return max(relative_error(b, a) for other in others for a, b in zip(want, other, strict=True))

    def _error(self, cache: FusedCache, ids: Tensor, rows: Tensor, want: Tensor) -> float:
        """Relative difference of the logits when ``rows`` of an exact cache are recomputed."""

        def write(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            return cache.scatter(layer, keys, values, rows, len(ids), self.kernels)

        with self.fusion_attention(scattered=True), cache.writing(write):
            got = self.step(ids[rows], rows, cache, for_model(self.masks(rows, len(ids)), self.config))
        return relative_error(got, want)

    @torch.no_grad()
    def _check_scattered(self, tolerance: Tolerance) -> None:
        """Recomputing scattered tokens of an exact cache must change nothing: the rules and the driving are right."""
        tokens = min(_CHECK_TOKENS, self.max_positions or _CHECK_TOKENS)
        ids, everywhere = self.random_ids(tokens), self._span(0, tokens)[0]
        cache = self.cache(tokens)
        want = self.step(ids, everywhere, cache)
        if not want.isfinite().all():
            raise UnsupportedModelError(f"a few tokens give NaN or infinite logits: {non_finite(self.dtype)}")
        rows = everywhere[tokens % 2 :: 2] if tokens > 2 else everywhere
        rows = torch.cat([rows[rows < tokens - 1], everywhere[-1:]])
        error = self._error(cache, ids, rows, want)
        if not tolerance.holds(error, self.dtype) and self.kernels == "auto" and self.spans is not None:
            self.spans = None  # the model's attention does more than it says: masks serve
            self.step(ids, everywhere, cache := self.cache(tokens))
            error = self._error(cache, ids, rows, want)
        if not tolerance.holds(error, self.dtype):
            raise UnsupportedModelError(
                f"recomputing scattered tokens changes the model's logits (relative difference {error:.2g}, of which its own noise "
                f"explains {tolerance.noisy:.2g}): its attention does not follow the masks that transformers builds for it"
            )


class _Recorder(FusedCache):
    """A cache that only looks at what is written."""

    def __init__(self) -> None:
        super().__init__([], 0)
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.seen[layer_idx] = (key_states, value_states)
        return key_states, value_states


def _device(embeddings: nn.Module) -> torch.device:
    """Where token ids go; offloaded weights (accelerate) come to where their hook runs them."""
    device: torch.device = embeddings.weight.device  # type: ignore[assignment]
    hook: Any = getattr(embeddings, "_hf_hook", None)
    return torch.device(hook.execution_device) if device.type == "meta" and hook is not None else device

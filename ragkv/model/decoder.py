"""What a model is to ragkv: its layers, rotations and attention rules; and which models are refused.

Nothing here knows a model by name. A model is asked what it does: where its decoder layers are, what it writes into a cache,
how its keys turn, which keys its layers see.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ragkv.errors import UnsupportedModelError
from ragkv.kernels import WIDEST_HEAD, Impl, implementation
from ragkv.model.attention import eager_attention
from ragkv.model.cache import FusedCache, LayerSpec
from ragkv.model.driving import Driving
from ragkv.model.inspection import decoder_layers, most_positions, non_finite, refuse_by_config, refuse_state, unwrapped
from ragkv.model.kernel_attention import SpanRule, hands_on, serves, span_rules
from ragkv.model.linear import wide
from ragkv.model.masks import Rule, SameMask, for_model, layer_rules
from ragkv.model.rope import Probe, Rotation, Tolerance, probe_rotations, relative_error
from ragkv.model.traits import Traits
from ragkv.model.turns import Turns, turns

_PROBE_TOKENS = 8
_MISFITS = TypeError, ValueError, RuntimeError, IndexError  # what models raise on being given what they do not know
_STORED = torch.float32, torch.bfloat16, torch.float16
_CHECK_TOKENS = 24
_SHAKE = 1e-5  # an exact model answers it by errors of its size; one that rounds coarsely, by its rounding


class Decoder(Driving):
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
        hands_on: layers attend with the very masks that the model is given, so that something else may stand in their place.
        max_positions: positions of the longest prompt, or ``None``.
        vocab_size: ids are below it.
        keeps_last: logits may be asked for of the last row alone.
        wide: passes of few rows may be faster in another order.
        probes: how often it was found out what the model does.

    Raises:
        UnsupportedModelError: by name of the reason, when the model cannot be driven exactly.
    """

    def __init__(self, model: PreTrainedModel, kernels: Impl = "auto", known: Traits | None = None):
        self.model: PreTrainedModel = unwrapped(model)
        self.kernels: Impl = kernels
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
        self.wide: bool = wide(self.layers)
        self.vocab_size: int = embeddings.weight.shape[0]
        self.device: torch.device = _device(embeddings)
        self.backbone: nn.Module = getattr(self.model, self.model.base_model_prefix, self.model)
        self.keeps_last: bool = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.rules: list[Rule] = layer_rules(self.config, len(self.layers), self.device)
        self.max_positions: int | None = most_positions(self.config)
        if known is None:
            with self.turns:
                self._try()
        else:
            self.specs: list[LayerSpec] = known.specs
            self.rotations: list[Rotation | None] = known.rotations
            self.max_positions = known.max_positions
            self.hands_on: bool = known.hands_on
            self.dtype: torch.dtype = self.specs[0].dtype
            self.spans = self._span_rules() if known.spans else None

    @property
    def traits(self) -> Traits:
        """What was found."""
        return Traits(self.specs, self.rotations, self.max_positions, self.spans is not None, self.hands_on)

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
        self.hands_on = self._hands_on()
        self.spans = self._span_rules()
        self._check_scattered(tolerance)

    def _span_rules(self) -> list[SpanRule] | None:
        ran = implementation(self.kernels, self.device, self.dtype)
        if self.kernels == "auto" and ran == "reference":
            return None  # sdpa with masks is faster than selective attention's reference
        if self.kernels == "auto" and max(max(spec.key_dim, spec.value_dim) for spec in self.specs) > WIDEST_HEAD:
            return None
        rules = self.rules_as_spans()
        if rules is None and self.kernels != "auto":
            raise UnsupportedModelError(
                f"kernels={self.kernels!r} was asked for, and this model's attention is none that the kernel computes (it goes "
                "past transformers' attention interface, or changes the masks that it is given): use kernels='auto'"
            )
        return rules

    def rules_as_spans(self) -> list[SpanRule] | None:
        """Every layer's rule as selective attention takes it; ``None`` where the model's attention is none that it computes."""
        serving = self.hands_on and serves(self.model, self.config)
        return span_rules(self.rules, self.device) if serving else None

    @torch.no_grad()
    def _hands_on(self) -> bool:
        def run(mask: Tensor) -> None:
            ids = self.random_ids(2)
            self.run(ids, torch.arange(2, device=self.device), self.cache(2), for_model(SameMask(mask), self.config))

        interface = bool(getattr(self.model, "_supports_attention_backend", False))
        return interface and hands_on(run, self.config, len(self.layers), self.device)

    def tolerance(self) -> Tolerance:
        """At which relative errors two runs of the model count as equal."""
        return Tolerance(self._noise)

    def _begin(self) -> Probe:
        """The probe's tokens at position 0, over a cache that only looks at what is written."""
        recorder = _Recorder()
        try:
            hidden = self.run(self.random_ids(_PROBE_TOKENS), torch.arange(_PROBE_TOKENS, device=self.device), recorder)
        except torch.OutOfMemoryError:
            raise
        except (*_MISFITS, AttributeError, KeyError, NotImplementedError, AssertionError) as error:
            raise UnsupportedModelError(
                f"the model does not run on token ids over a plain key-value cache ({type(error).__name__}: {error}): it asks for "
                "a cache, a state or inputs of its own. ragkv needs a decoder that runs over any transformers Cache"
            ) from error
        without = sorted(set(range(len(self.layers))) - set(recorder.seen))
        if len(without) == len(self.layers):
            raise UnsupportedModelError(
                "the model writes nothing into the key-value cache that it is given: it has none, or keeps a state of its own. "
                "There is nothing to reuse; ragkv needs a decoder whose layers all keep keys and values"
            )
        if without:
            raise UnsupportedModelError(
                f"layers {', '.join(map(str, without))} of the model's {len(self.layers)} keep no keys and values of their own: "
                "they share another layer's, keep a state, or attend to something else than the text. ragkv needs a decoder whose "
                "layers all keep them"
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
                at = torch.arange(offset, offset + _PROBE_TOKENS, device=self.device)
                hidden = self.run(self.random_ids(_PROBE_TOKENS), at, cache)
            if any(layer.length != _PROBE_TOKENS for layer in cache.layers):
                raise RuntimeError("it did not compute the tokens that it was given")
        except (IndexError, RuntimeError) as error:
            raise UnsupportedModelError(
                f"the model cannot run at position {offset}: it takes positions from a table of its own, or from the number of "
                f"keys (ALiBi), and ragkv needs a decoder with rotary positions ({error})"
            ) from error
        return Probe([layer.keys[0] for layer in cache.layers], [layer.values[0] for layer in cache.layers], hidden)

    @torch.no_grad()
    def _noise(self) -> float:
        """How far apart passes are that an exact model computes alike: in one piece, in several, and of all but the same input."""
        tokens = min(_CHECK_TOKENS, self.max_positions or _CHECK_TOKENS)
        ids, everywhere = self.random_ids(tokens), torch.arange(tokens, device=self.device)
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
        ids, everywhere = self.random_ids(tokens), torch.arange(tokens, device=self.device)
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
                f"explains {tolerance.noisy:.2g}): its attention does not follow the masks that transformers builds for it, so "
                "that it cannot be told which keys a token sees; ragkv needs a decoder that attends by the masks it is given"
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

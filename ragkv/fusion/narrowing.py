"""A pass whose rows become fewer with depth: before some layers a method is asked which ones to go on with.

H kv heads, S tokens being computed, R reusable ones among them, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ragkv.fusion.passes import Pass
from ragkv.fusion.view import Check
from ragkv.model.cache import Writer
from ragkv.model.masks import LayerMasks, for_model


class _Reached(Exception):
    """Ends a forward once the keys and values of one layer are known."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values = keys, values


class Narrowing(Pass):
    """A pass over a plan with checks, each of them in a pre-hook of its layer. The set of rows never grows again."""

    kept: Tensor | None = None  # rows as indices into those that the forward began with, once narrowed

    def _computed(self) -> Tensor:
        self.checks: tuple[int, ...] = self.work.checks
        whole = not self._limited and len(self.rows) == self.layout.tokens - self.layout.held
        if whole and self.masses is None:
            self._first_check()
        return self._narrowing() if self.checks else super()._computed()

    def _narrowing(self) -> Tensor:
        """Scattered rows that become fewer with depth."""
        self.piece, self.begun, masses = self.rows, len(self.rows), self._seen_by(self.rows)
        layers = list(enumerate(self.decoder.layers))[self.checks[0] :]
        hooks = [layer.register_forward_pre_hook(self._hook(number), with_kwargs=True) for number, layer in layers]
        if self.decoder.keeps_last:
            hooks.append(layers[-1][1].register_forward_hook(self._widened))
        try:
            with self._attention(scattered=True, masses=masses), self.cache.writing(self._write):
                self.masks: LayerMasks = self._masks(self.rows)
                at, mask = self.layout.positions[self.rows], for_model(self.masks, self.decoder.config)
                return self.decoder.step(self.layout.ids[self.rows], at, self.cache, mask)
        finally:
            for hook in hooks:
                hook.remove()

    def _widened(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """As many rows as the forward began with, zeros where none are left: some models shape the end like the beginning."""
        if self.kept is None:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        wide = hidden.new_zeros(hidden.shape[0], self.begun, hidden.shape[2])
        wide[:, self.kept.to(hidden.device)] = hidden
        return (wide, *output[1:]) if isinstance(output, tuple) else wide

    def _first_check(self) -> None:
        """Where every token that is not held is computed up to the first check, do so piece by piece and stop there.

        The layers above the check are run again for the few tokens that were kept: that costs less than to hold the hidden
        states of all.
        """
        layer, keys, values, first = self.checks[0], [], [], self.layout.held
        with self.cache.writing(self._until(layer)):
            for piece in self._pieces():
                self.cache.set_length(first)
                first += len(piece)
                masks = self.decoder.behind(self.cache, len(piece))
                mask = None if masks is None else for_model(masks, self.decoder.config)
                try:
                    with self._attention(scattered=masks is not None):
                        self.decoder.run(self.layout.ids[piece], piece, self.cache, mask)
                except _Reached as reached:
                    keys.append(reached.keys)
                    values.append(reached.values)
        self._shrink(layer, self._choose(layer, torch.cat(keys, 2), torch.cat(values, 2)))
        self.checks = self.checks[1:]

    def _until(self, last: int) -> Writer:
        """Appends up to a layer and ends the forward there."""

        def write(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            if layer == last:
                raise _Reached(keys, values)
            return self.cache.layers[layer].update(keys, values)

        return write

    def _hook(self, number: int) -> Callable[..., tuple[tuple, dict]]:
        def narrowed(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
            hidden, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
            if number in self.checks:
                inner = tuple(self._take(value) for value in rest), self._take_all(number, kwargs)
                keep = self._choose(number, *self._peek(number, module, (hidden, *inner[0]), inner[1]))
                hidden = hidden[:, keep.to(hidden.device)]
                self.kept = keep if self.kept is None else self.kept[keep]
                self._shrink(number, keep)
                self.masks = self._masks(self.rows)
            rest, kwargs = tuple(self._take(value) for value in rest), self._take_all(number, kwargs)
            if args:
                return (hidden, *rest), kwargs
            return (), {**kwargs, "hidden_states": hidden}

        return narrowed

    def _peek(self, number: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Run a layer only as far as its keys and values ``[1, H, S, D]``."""
        kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        self.cache.writer = self._until(number)
        try:
            module.forward(*args, **kwargs)
        except _Reached as reached:
            return reached.keys, reached.values
        finally:
            self.cache.writer = self._write
        raise AssertionError(f"layer {number} ended without writing keys and values")

    def _choose(self, number: int, keys: Tensor, values: Tensor) -> Tensor:
        """Ask which rows to keep, given all rows' fresh ``[1, H, S, D]``; returns them as indices into the present rows."""
        assert self.work.narrow is not None
        with self.timer.stage("select"):
            stop = len(self.rows) - self.layout.suffix_tokens
            inside = slice(stop - self.fresh[number], stop)
            held, tokens = self.cache.layers[number], self.rows[inside].to(keys.device)
            fresh = keys[0][:, inside], values[0][:, inside]
            stored = held.key_room[0].index_select(1, tokens), held.value_room[0].index_select(1, tokens)
            looked = torch.stack(self.masses.behind) if self.masses is not None and self.masses.behind else None
            layers, impl = len(self.decoder.layers), self.decoder.kernels
            chosen = self.work.narrow(Check(number, layers, self.layout, tokens, *fresh, *stored, impl, looked))
            suffix = torch.arange(stop, len(self.rows), device=self.rows.device)
            return torch.cat([torch.searchsorted(self.rows, chosen.to(self.rows.device)), suffix])

    def _shrink(self, layer: int, keep: Tensor) -> None:
        """Go on with some of the present rows; at the check layer itself, all had their keys and values computed."""
        self.rows, self._known = self.rows[keep], False
        self.piece = self.rows
        self._seen_by(self.rows)
        behind = layer + 1
        fresh = len(keep) - self.layout.suffix_tokens
        self.fresh[behind:] = [fresh] * (len(self.fresh) - behind)

    def _take_all(self, number: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        if self.kept is None:
            return kwargs
        taken = {
            name: self._take(value) for name, value in kwargs.items() if name not in ("attention_mask", "hidden_states")
        }
        return {**taken, "attention_mask": self.masks.layer(number)}

    def _take(self, value: Any) -> Any:
        """The present rows of whatever a layer is given for the rows that the forward began with: ``[B, S, ...]``."""
        if self.kept is None:
            return value
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == self.begun:
            return value[:, self.kept.to(value.device)]
        if isinstance(value, tuple):
            return tuple(self._take(item) for item in value)
        return value

"""At what depth a model binds tokens to the text in front of them, found out on a short text of ours.

L layers, T tokens.
"""

from __future__ import annotations

from torch import Tensor

#: CacheBlend's share of the tokens, at which layers are compared.
_SHARE = 0.15
#: A layer that does nearly as well as the best one is taken for it if it comes earlier: all tokens are run up to it.
_NEARLY = 0.95


def check_layer(changes: Tensor) -> int:
    """The earliest layer whose most changed tokens are nearly those that change most in the layers behind it.

    A layer is worth the share of the change in all layers behind it that its own 15 % of most changed tokens account for,
    relative to the best choice of as many. The model binds tokens to what stands in front at a depth of its own, and
    a layer before that shows nothing of it.

    Args:
        changes: ``[L, T]`` how much each token's values change in each layer behind another text.

    Returns:
        A layer from 1 to L - 2; 1 where there are too few layers, or too few tokens, to compare.
    """
    layers, tokens = changes.shape
    taken = round(_SHARE * tokens)
    if layers < 3 or not taken:
        return 1
    worth = [_worth(changes[layer], changes[layer + 1 :].mean(0), taken) for layer in range(1, layers - 1)]
    return 1 + next((number for number, value in enumerate(worth) if value >= _NEARLY * max(worth)), 0)


def _worth(seen: Tensor, behind: Tensor, taken: int) -> float:
    best = behind.topk(taken).values.sum()
    return float(behind[seen.topk(taken).indices].sum() / best) if best else 0.0

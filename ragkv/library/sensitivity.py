"""Sensitivity: how much a token's values change when another text stands in front of its document.

A document's KV are made behind the anchor. In a prompt other documents stand in front. Most tokens read nothing into that; those
that do ("the document above", "the second firm") are the ones to recompute. Which they are shows when the document is read: it is
read a second time, behind a foreign text, and the values of both readings are compared. At query time nothing has to be run to
find them, unlike the deviation that CacheBlend measures there (arXiv:2405.16444).

L layers, H kv heads, T tokens of a document, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ragkv.prompt import Encoder, Text

# Several small texts about people, firms and places, with sentences that refer to others: whatever refers to something in front
# of its document finds something there.
FOREIGN = (
    "Anna Marsh was born in 1961 and lives in Leeds. She runs a small bakery in the old part of the town, which she opened "
    "in 1998. Her first language is French, and in the evening she plays the piano. The company now has forty people and "
    "sells bread all over the north of England. Last year the town gave the firm a prize.\n\n"
    "Leeds is a large town on the river Aire. Its market was first held in 1626, and the hall is known for its clock. Many "
    "people visit it in May, when the flower show takes place.\n\n"
    "Peter Lang is a carpenter. He was born in Ghent and moved to Hull in 1984, where he works for a firm that builds "
    "boats. He keeps two dogs and collects old maps. His brother, a doctor, lives in the same street.\n\n"
    "Northern Mills was founded in 1902 and is based in Hull. It makes paper and soap, and its vans are green. The company "
    "employs 300 people and is led by Carla Stein. She wrote the second report, which is kept in the library.\n\n"
    "Section 2 of the contract says that the tenant pays the rent on the first day of the month. If he does not, the owner "
    "may end it. The method described above was tested on four sets of data; the results in the third table are better than "
    "those of the earlier one."
)


def sensitivity(alone: Sequence[Tensor], behind: Sequence[Tensor], foreign: Sequence[Tensor]) -> Tensor:
    """Squared change of the values, in each layer relative to the foreign text's mean square, averaged over layers.

    Layer 0 is left out: its values depend on the token alone. Values only, for they do not turn with the position.

    Args:
        alone: L values ``[H, T, D]`` of tokens of a document behind the anchor.
        behind: the same tokens' values behind the anchor and the foreign text.
        foreign: L values ``[H, F, D]`` of the foreign text: a yardstick that is the same for all documents.

    Returns:
        ``[T]`` fp32, on the CPU; 0 everywhere where there was no room for a foreign text. Waited for once, not for each layer.
    """
    if not foreign[0].shape[1]:
        return torch.zeros(alone[0].shape[1], dtype=torch.float32, device="cpu")
    total = torch.zeros(alone[0].shape[1], dtype=torch.float32, device=alone[0].device)
    for own, other, unit in zip(alone[1:], behind[1:], foreign[1:], strict=True):
        size = unit.float().square().sum((0, 2)).mean().clamp_min(torch.finfo(torch.float32).tiny)
        total += ((own.float() - other.float()).square().sum((0, 2)) / size).to(total.device)
    return (total / max(1, len(alone) - 1)).cpu()


def foreign_ids(encoder: Encoder, given: Text | None) -> tuple[int, ...]:
    """The ids of a foreign text: the one that is given, else :data:`FOREIGN`, or 64 fixed ids where there is no tokenizer."""
    if given is not None:
        return encoder.chunk(given)
    if encoder.tokenizer is not None:
        return encoder.chunk(FOREIGN)
    draw = torch.randint(encoder.vocab_size, (64,), generator=torch.Generator().manual_seed(0), device="cpu")
    return encoder.chunk(draw.tolist())

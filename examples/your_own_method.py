"""Your own method, without touching ragkv: say which of the chunks' tokens are computed afresh.

A method is a frozen dataclass; its fields are its knobs. `select` sees the prompt and returns tokens by their place in it.
(With a `ragkv.Selection` that names layers, and `narrow`, it looks at the layers' fresh KV and drops tokens on the way, as
`ragkv.CacheBlend` does.)

    python examples/your_own_method.py
"""

from dataclasses import dataclass

from torch import Tensor

import ragkv
from ragkv import bundled


@dataclass(frozen=True)
class Seams(ragkv.Method):
    """Recompute a chunk's first k tokens where a document begins or breaks off; behind its own predecessor it may stay."""

    k: int = 16

    def select(self, view: ragkv.View) -> Tensor:
        """The first k tokens behind every seam."""
        seams = [placed for placed in view.layout.chunks if not placed.exact and not placed.continues]
        return view.layout.span(*seams, first=self.k)


def main() -> None:
    """Compare the method with others on one prompt: what it recomputes, and how far its logits are from a full prefill's."""
    model, tokenizer = bundled.load()
    documents = list(bundled.documents().values())[:3]
    question = bundled.questions()[0].question
    with ragkv.Engine(model, tokenizer, template=ragkv.PromptTemplate(**bundled.TEMPLATE)) as engine:
        chunks = [chunk for text in documents for chunk in engine.add_document(text.strip().split("\n\n"))]
        exact = engine.fuse(chunks, question, method=ragkv.FullPrefill())
        print("method             tokens recomputed   largest difference of a logit")
        for method in (ragkv.Reuse(), ragkv.LegoLink(k=16), Seams(k=16), ragkv.FullPrefill()):
            prompt = engine.fuse(chunks, question, method=method)
            report = prompt.report
            difference = float((prompt.logits - exact.logits).abs().max())
            print(f"{method!r:<18} {report.fresh_by_layer[-1]:>8} of {report.chunk_tokens:<6}   {difference:.4f}")


if __name__ == "__main__":
    main()

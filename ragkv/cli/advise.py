"""``ragkv advise``: when reuse pays, and what documents would take."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ragkv.cli import pages, show
from ragkv.cli.arguments import folder
from ragkv.cli.opening import open_rag, options_of
from ragkv.pictures import advice_picture

if TYPE_CHECKING:
    from ragkv.advice import Advice

_TITLE = "Time to the first token by the length of the prompt: full prefill, and chunks from each tier"


def run(args: argparse.Namespace) -> int:
    """Measure, or look up what was measured, and show it."""
    path = folder(args)
    pages.check(args)
    with open_rag(path, **options_of(args)) as rag:
        advice = rag.engine.advise(limit_s=args.limit, again=args.again)
    if args.json:
        show.as_json({"path": str(path), **advice.as_dict(args.tokens)})
    else:
        _show(advice, args.tokens)
    if args.page is not None:
        tables = {"prompts": prompts(advice), "corpus": corpus(advice, args.tokens)}
        said = {"speed": speed(advice), "line": corpus_line(advice, args.tokens)}
        pages.write(args, "advice.html.j2", _TITLE, advice_picture(advice), advice=advice, **said, **tables)
    return 0


def _show(advice: Advice, tokens: int) -> None:
    print(f"{advice.machine}; prefill {speed(advice)}\n")
    show.table(prompts(advice))
    print(f"\n{corpus_line(advice, tokens)}\n")
    show.table(corpus(advice, tokens))


def speed(advice: Advice) -> str:
    """How fast the model prefills, at each length that was measured."""
    costs = advice.rates.costs
    said = [f"{new / costs(0, new):,.0f} tokens/s of {new:,}" for new in costs.new if costs(0, new) > 0]
    return ", ".join(said)


def prompts(advice: Advice) -> list[tuple[str, ...]]:
    """A table: what prompts take, computed and from each tier."""
    tiers = list(advice.rates.tiers)
    rates = [advice.rates.tiers[tier] for tier in tiers]
    starts = [advice.pays_from(tier) for tier in tiers]
    rows = [
        ("", "full prefill", *tiers),
        ("reads", "", *(f"{show.size(round(rate.bytes_per_s))}/s" for rate in rates)),
        ("pays from", "", *("never" if start is None else show.number(start, "token") for start in starts)),
    ]
    for length in advice.lengths:
        full_s = advice.full_s(length)
        rows.append(
            (f"{length:,} tokens", _time(full_s), *(_against(full_s, advice.reuse_s(tier, length)) for tier in tiers))
        )
    uses = [advice.uses(tier, advice.lengths[-1]) for tier in tiers]
    rows.append(("reading has paid after", "", *("never" if use is None else show.number(use, "use") for use in uses)))
    return rows


def corpus(advice: Advice, tokens: int) -> list[tuple[str, ...]]:
    """A table: what the KV of so many tokens take, by codec."""
    rows: list[tuple[str, ...]] = [("codec", "bytes a token", f"{tokens:,} tokens")]
    for codec, size in advice.codec_bytes.items():
        used = " (in use)" if codec == advice.codec else ""
        rows.append((f"{codec}{used}", f"{size:,.0f}", show.size(round(size * tokens))))
    return rows


def corpus_line(advice: Advice, tokens: int) -> str:
    """How long reading so many tokens takes."""
    twice = ", each twice" if advice.passes == 2 else ""
    return f"reading {tokens:,} tokens of documents{twice}: about {show.duration(advice.corpus_s(tokens))}"


def _against(full_s: float, reuse_s: float) -> str:
    return f"{_time(reuse_s)} ({full_s / reuse_s:.1f}x)"


def _time(seconds: float) -> str:
    return show.milliseconds(seconds * 1e3)

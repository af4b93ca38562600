"""``ragkv bench store``: eviction policies on a stream of real passages, with a real model's prefill times."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from transformers.utils import logging

from ragkv.chunk import digest
from ragkv.cli import show
from ragkv.errors import DocumentError, MissingPackageError
from ragkv.library.costs import measure
from ragkv.library.reading import Reader
from ragkv.model.decoder import Decoder
from ragkv.model.loading import load_model
from ragkv.store import CostProfile
from ragkv.store.simulation import Outcome, Request, compare
from ragkv.store.streams import read_passages, zipf_stream
from ragkv.tokenizer import PrivateTokenizer

_SHARES = (0.05, 0.1, 0.2, 0.4)
_STREAMS = {"stationary": 1, "drifting": 10}
_LIMIT_S = 10.0

#: By stream and policy, for each capacity an outcome of every seed.
Results = dict[str, dict[str, list[list[Outcome]]]]


def run(args: argparse.Namespace) -> int:
    """Compare the policies; print tables or JSON, and draw a plot where asked to."""
    catalogue, profile = _catalogue(args)
    results: Results = {}
    with show.progress(total=len(_STREAMS) * args.seeds, unit=" streams") as bar:
        for name, phases in _STREAMS.items():
            runs = []
            for seed in range(args.seeds):
                stream = zipf_stream(catalogue, args.requests, args.exponent, seed=seed, phases=phases)
                runs.append(compare(stream, _SHARES))
                bar.update()
            results[name] = {
                policy: [[one[policy][at] for one in runs] for at in range(len(_SHARES))] for policy in runs[0]
            }
    about = {
        "dataset": Path(args.dataset).name,
        "model": args.model,
        "passages": len(catalogue),
        "mean_tokens": mean(request.tokens for request in catalogue),
        "requests": args.requests,
        "exponent": args.exponent,
        "seeds": args.seeds,
        "prefill_seconds": {str(count): profile(0, count) for count in profile.new},
    }
    if args.plot is not None:
        _plot(results, args.plot)
    if args.json:
        show.as_json({**about, "capacities": list(_SHARES), "streams": _as_dict(results)})
    else:
        _show(results, about)
    return 0


def _catalogue(args: argparse.Namespace) -> tuple[list[Request], CostProfile]:
    """Every passage of the dataset with its tokens, its bytes of KV, and the seconds that the model prefills it in."""
    passages = list(dict.fromkeys(read_passages(Path(args.dataset))))
    if not passages:
        raise DocumentError(f"{args.dataset}: no passages in it")
    logging.disable_progress_bar()  # of loading weights
    model, tokenizer, *_ = load_model(args.model, None, {})
    decoder = Decoder(model)
    reader = Reader(decoder, (), 512)
    per_token = sum(s.heads * (s.key_dim + s.value_dim) * s.dtype.itemsize for s in decoder.specs)
    profile = measure(reader, decoder.max_positions or 1 << 30, _LIMIT_S)
    counts = [max(len(ids), 1) for ids in PrivateTokenizer(tokenizer).plain(passages)]
    return [
        Request(digest(text), count * per_token, count, profile(0, count))
        for text, count in zip(passages, counts, strict=True)
    ], profile


def _as_dict(results: Results) -> dict[str, Any]:
    return {
        stream: {
            policy: {
                "token_hit_rate": [mean(run.token_hit_rate for run in runs) for runs in capacities],
                "saved_seconds": [mean(run.saved_s for run in runs) for runs in capacities],
                "saved_share": [mean(run.saved_share for run in runs) for runs in capacities],
            }
            for policy, capacities in policies.items()
        }
        for stream, policies in results.items()
    }


def _show(results: Results, about: dict[str, Any]) -> None:
    print(
        f"{show.number(about['passages'], 'passage')} of {about['mean_tokens']:.0f} tokens; "
        f"{show.number(about['requests'], 'request')} (Zipf, exponent {about['exponent']}), means of "
        f"{show.number(about['seeds'], 'stream')}. Capacity in per cent of all passages' KV."
    )
    for stream, policies in results.items():
        for what, unit in (("token_hit_rate", "hit rate by tokens"), ("saved_s", "prefill seconds saved")):
            print(f"\n{stream}: {unit}")
            rows: list[Sequence[str]] = [("", *(f"{share:.0%}" for share in _SHARES))]
            for policy, capacities in policies.items():
                values = [mean(getattr(run, what) for run in runs) for runs in capacities]
                rows.append((policy, *(f"{value:.3f}" if value < 1 else f"{value:,.1f}" for value in values)))
            show.table(rows)


def _plot(results: Results, target: str) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingPackageError("plots need matplotlib. Install it with: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(results), figsize=(5.5 * len(results), 8), squeeze=False)
    marks = dict(
        zip(("pgdsf", "lru", "lfu", "gdsf", "belady"), "os^xd", strict=True)
    )  # where lines meet, both are seen
    kinds = (("token_hit_rate", "hit rate by tokens"), ("saved_s", "prefill seconds saved"))
    for column, (stream, policies) in enumerate(results.items()):
        for row, (what, label) in enumerate(kinds):
            panel = panels[row][column]
            for policy, capacities in policies.items():
                values = [mean(getattr(run, what) for run in runs) for runs in capacities]
                dashed = "--" if policy == "belady" else "-"
                panel.plot(_SHARES, values, marker=marks.get(policy, "o"), linestyle=dashed, label=policy, alpha=0.8)
            panel.set(title=stream, xlabel="capacity, share of all passages' KV", ylabel=label, xscale="log")
            panel.set_xticks(_SHARES, [f"{share:.0%}" for share in _SHARES])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)

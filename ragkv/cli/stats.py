"""``ragkv stats``: what a folder holds, and how it was used. No model is loaded."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ragkv.cli import pages, show
from ragkv.cli.arguments import folder
from ragkv.cli.opening import require_documents
from ragkv.pictures import store_picture
from ragkv.retrieval import Catalogue
from ragkv.store import TieredStore
from ragkv.store.maintenance import history
from ragkv.store.stats import Tally


def run(args: argparse.Namespace) -> int:
    """Show documents, passages, stored KV, and what all processes that used them did."""
    path = folder(args)
    require_documents(path)
    pages.check(args)
    done = history(path / "kv")
    found = {"path": str(path), **_documents(path), "store": _store(path), "history": _history(done)}
    if args.json:
        show.as_json(found)
    else:
        _show(found)
    if args.page is not None:
        drawn = store_picture(done.samples) if done.samples else None
        pages.write(args, "store.html.j2", "The store from closing to closing", drawn, found=found)
    return 0


def _documents(path: Path) -> dict[str, Any]:
    with Catalogue(path / "documents") as catalogue:
        documents = catalogue.documents()
        return {
            "made_with": {
                **catalogue.defaults,
                **{what: setting["name"] for what, setting in catalogue.settings.items()},
            },
            "documents": len(documents),
            "passages": sum(len(document.passage_ids) for document in documents),
        }


def _store(path: Path) -> dict[str, Any]:
    """The tiers that outlive a process: memory is this process's own, and empty."""
    with TieredStore(path / "kv", cpu_bytes=0) as store:
        stats = store.stats()
    return {
        "tiers": {"disk": {"entries": stats.entries["disk"], "bytes": stats.bytes["disk"]}},
        "file_bytes": stats.file_bytes,
    }


def _history(done: Tally) -> dict[str, Any]:
    """What processes wrote down when they closed the folder; those that were killed are missing."""
    return {
        "hits": dict(done.hits),
        "misses": done.misses,
        "tokens_hit": done.tokens_hit,
        "puts": done.puts,
        "refused": done.refused,
        "bytes_read": done.bytes_read,
        "bytes_written": done.bytes_written,
        "evictions": {tier: dict(reasons) for tier, reasons in done.evictions.items() if reasons},
        "checks": {
            method: {"count": item.count, "mean_kl": item.mean_kl, "agreed": item.agreed}
            for method, item in done.checks.items()
        },
        "latency_ms": {
            stage: {"count": item.count, "median": item.median_s * 1e3, "p95": item.p95_s * 1e3}
            for stage, item in done.latency.items()
        },
    }


def _show(found: dict[str, Any]) -> None:
    print(
        f"{show.number(found['documents'], 'document')}, {show.number(found['passages'], 'passage')} in {found['path']}"
    )
    for what, name in found["made_with"].items():
        print(f"{what}: {name if isinstance(name, str | int) else json.dumps(name, ensure_ascii=False)}")
    tiers = found["store"]["tiers"]
    rows = [("KV", "entries", "size")]
    rows += [(tier, f"{held['entries']:,}", show.size(held["bytes"])) for tier, held in tiers.items()]
    rows.append(("the file, with free pages", "", show.size(found["store"]["file_bytes"])))
    print()
    show.table(rows)
    _show_history(found["history"])


def _show_history(done: dict[str, Any]) -> None:
    reads = [("reads", "chunks"), *((f"from {tier}", f"{count:,}") for tier, count in done["hits"].items())]
    print()
    show.table([*reads, ("missed", f"{done['misses']:,}")])
    if done["evictions"]:
        evicted = [
            (tier, why, f"{count:,}") for tier, reasons in done["evictions"].items() for why, count in reasons.items()
        ]
        print()
        show.table([("evicted from", "reason", "chunks"), *evicted], left=2)
    if done["checks"]:
        checked = [
            (method, f"{item['count']:,}", f"{item['mean_kl']:.3f}", f"{item['agreed'] / item['count']:.1%}")
            for method, item in done["checks"].items()
        ]
        print()
        show.table([("checked against full prefill", "prompts", "mean KL", "same first token"), *checked])
    if done["latency_ms"]:
        times = [
            (stage, f"{item['count']:,}", show.milliseconds(item["median"]), show.milliseconds(item["p95"]))
            for stage, item in done["latency_ms"].items()
        ]
        print()
        show.table([("time", "count", "median", "p95"), *times])

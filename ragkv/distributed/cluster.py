"""Workers on a Ray cluster: one actor of Ray Data each, and a desk where the command runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

from ragkv import errors
from ragkv.distributed.desk import DEATHS, Desk
from ragkv.distributed.results import Result
from ragkv.errors import ArgumentError, MissingPackageError, RagKVError

logger: logging.Logger = logging.getLogger(__name__)

_MOST_CPUS = 4.0
_ERROR = "error"  # the column that says which kind of error ends it all
_START = b""  # in a document's place: a worker that is being made


class Reads(Protocol):
    """A :class:`~ragkv.distributed.worker.Worker`."""

    def read(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Result]]:
        """Read documents, in batches."""


class Share(NamedTuple):
    """How many workers there are, and what each of them has."""

    workers: int
    cpus: float
    gpus: float


def needed() -> Any:
    """The package ``ray``, with ``ray.data``.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingPackageError(f"reading on a cluster needs Ray: pip install 'ragkv[ray]' ({error})") from error
    return ray


def nodes() -> list[dict[str, float]]:
    """What the machines of the cluster have."""
    return [node["Resources"] for node in needed().nodes() if node["Alive"]]


def share(
    nodes: Sequence[Mapping[str, float]],
    workers: int | None,
    cpus: float | None,
    gpus: float | None,
    device: str | None = None,
    spare_cpus: int = 0,
) -> Share:
    """Divide a cluster: a worker a GPU, or a worker for every four cores.

    Args:
        nodes: what each machine has, by Ray's names.
        workers, cpus, gpus: as asked for; ``None`` is found out.
        device: that workers are to compute on; by default GPUs where there are any.
        spare_cpus: that others need.

    Raises:
        ArgumentError: no machine has what one worker needs.
    """
    on_gpus = gpus != 0 and (device or "cuda").startswith("cuda") and any(node.get("GPU", 0) for node in nodes)
    gpus = float(on_gpus) if gpus is None else gpus
    largest = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
    cpus = (1.0 if gpus else max(1.0, min(_MOST_CPUS, largest))) if cpus is None else cpus
    if device is not None and device.startswith("cuda") != bool(gpus):
        raise ArgumentError(
            f"workers are to compute on {device}, and would have {gpus:g} GPUs each: give device= and gpus= that agree, and a "
            "cluster that has them. What is computed on a GPU is not found on a CPU, nor the other way round"
        )
    needs = [(kind, amount) for kind, amount in (("CPU", cpus), ("GPU", gpus)) if amount]
    fit = sum(int(min((node.get(kind, 0.0) / amount for kind, amount in needs), default=0)) for node in nodes)
    if workers is None:
        if not fit:
            raise ArgumentError(
                f"no machine of the cluster has {cpus:g} CPUs and {gpus:g} GPUs for a worker: give "
                "others as cpus= and gpus=, or workers=, where the cluster grows by itself"
            )
        left = sum(node.get("CPU", 0.0) for node in nodes) - fit * cpus
        workers = max(1, fit - (spare_cpus > left))
    return Share(workers, cpus, gpus)


def read(documents: Any, make: Callable[..., Reads], share: Share, bar: bool) -> Iterator[Result]:
    """Have workers read documents.

    A worker whose process ends is started again, and reads again what was not said to be read.

    Args:
        documents: a ``ray.data.Dataset`` of rows as a worker takes them, or the names of files, a list for each batch.
        make: makes a worker, given a desk.
        share: how many, and what each has.
        bar: let Ray Data show its progress.

    Raises:
        RagKVError: as a worker; or one could not even be made.
    """
    ray = needed()
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    always = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    desk = ray.remote(**always)(Desk).remote()
    if isinstance(documents, list):
        import pyarrow

        documents = ray.data.from_arrow([pyarrow.table({"source": names}) for names in documents])
    done = documents.map_batches(
        _Actor,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=share.workers, max_tasks_in_flight_per_actor=1),
        fn_constructor_args=(make, desk, share.workers + DEATHS),
        num_cpus=share.cpus,
        num_gpus=share.gpus or None,
    )
    settings = done.context  # which a Dataset shares with those that are made of it
    shown, settings.enable_progress_bars = settings.enable_progress_bars, settings.enable_progress_bars and bar
    rows = done.iter_rows()
    try:
        for row in rows:
            error = row.pop(_ERROR)
            if error:
                raise _raised(error, row["reason"])
            yield Result(**row)
    finally:
        del rows  # whoever still reads is stopped
        settings.enable_progress_bars = shown
        ray.kill(desk)


class _Actor:
    """A worker in a process of Ray's. Its errors are rows: raised, they would come with Ray Data's own advice, and as its bugs."""

    def __init__(self, make: Callable[..., Reads], handle: Any, starts: int) -> None:
        desk = _Asked(handle)
        self._failed: Exception | None = None
        try:
            if desk.begin(_START) > starts:
                raise RagKVError(f"{DEATHS} workers died before they could read anything: is their memory too small?")
            self._worker = make(desk=desk)
            desk.end(_START)
        except Exception as error:
            self._failed = error

    def __call__(self, table: Any) -> Iterator[dict[str, list[Any]]]:
        try:
            if self._failed is not None:
                raise self._failed
            for results in self._worker.read(table.to_pylist()):
                yield _columns(results)
        except Exception as error:
            logger.exception("a worker ends")
            known = isinstance(error, RagKVError)
            reason = str(error) if known else f"a worker failed: {type(error).__name__}: {error}"
            yield _columns([Result("", reason=reason)], type(error).__name__ if known else RagKVError.__name__)


class _Asked(Desk):
    """The desk as it is asked from afar."""

    def __init__(self, desk: Any) -> None:
        self._desk = desk

    def read(self, path: str) -> bytes:
        return cast(bytes, self._ask(self._desk.read, path))

    def begin(self, document: bytes) -> int:
        return cast(int, self._ask(self._desk.begin, document))

    def end(self, document: bytes) -> None:
        self._ask(self._desk.end, document)

    def _ask(self, method: Any, of: Any) -> Any:
        ray = needed()
        try:
            return ray.get(method.remote(of))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None


def _columns(results: Sequence[Result], error: str = "") -> dict[str, list[Any]]:
    named = {name: [_sendable(getattr(result, name)) for result in results] for name in Result._fields}
    return {**named, _ERROR: [error] * len(results)}


def _sendable(value: Any) -> Any:
    """Text that Arrow takes: an error may name what is not valid Unicode."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _raised(name: str, reason: str) -> RagKVError:
    """An error of ours, by the name of its kind."""
    kind = getattr(errors, name, RagKVError)
    return cast(RagKVError, kind(reason))

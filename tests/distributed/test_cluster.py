"""Workers on Ray: what becomes of them when they die, fail, or cannot even be made. They have no model here: they are quick."""

import os
import signal

import pytest

from ragkv import ArgumentError, DocumentError, ModelNotFoundError, RagKVError, UploadError
from ragkv.distributed import cluster
from ragkv.distributed.cluster import Share
from ragkv.distributed.desk import DEATHS
from ragkv.distributed.results import Result, gathered

TWO = Share(workers=2, cpus=1, gpus=0)


def made(**doing):
    """Makes workers that read files and do something else at some of them; a closure goes to a worker whole."""
    deaths, endings, raised, making = (doing.get(name) for name in ("once", "always", "raised", "making"))

    def make(desk):
        class Quick:
            def read(self, rows):
                for row in rows:
                    yield [self.result(row["source"])]

            def result(self, path):
                name = os.path.basename(path)
                begun = desk.begin(path.encode())
                if (name == endings and begun <= DEATHS) or (name == deaths and begun == 1):
                    os.kill(os.getpid(), signal.SIGKILL)
                try:
                    if begun > DEATHS:
                        return Result(path, reason="given up")
                    if raised and name == raised[0]:
                        raise raised[1]
                    return Result(path, 1, 1, len(desk.read(path)), setting=str(os.getpid() > 0))
                except DocumentError as error:
                    return Result(path, reason=str(error))
                finally:
                    desk.end(path.encode())

        if making is not None and not isinstance(making, Exception):
            os.kill(os.getpid(), making)
        if making is not None:
            raise making
        return Quick()

    return make


@pytest.fixture
def files(tmp_path):
    for name in "abcdef":
        (tmp_path / name).write_text(name * 10)
    return [[str(tmp_path / name) for name in names] for names in ("ab", "c", "de", "f")]


@pytest.mark.long
def test_a_worker_that_is_killed_is_started_again_and_nothing_is_missing(ray, files):
    files[1].append("/nowhere/at/all")
    report = gathered(cluster.read(files, made(once="d"), TWO, bar=False), {})
    assert report.documents == 6 and report.tokens_read == 60
    assert ray.data.DataContext.get_current().enable_progress_bars, "the settings of the process were changed"
    assert list(report.failed) == ["/nowhere/at/all"] and "No such file" in report.failed["/nowhere/at/all"]


@pytest.mark.long
def test_a_document_that_every_worker_dies_of_is_given_up(ray, files):
    report = gathered(cluster.read(files, made(once="d", always="b"), TWO, bar=False), {})
    assert report.documents == 5 and report.tokens_read == 50
    assert {os.path.basename(path): why for path, why in report.failed.items()} == {"b": "given up"}


@pytest.mark.long
def test_workers_that_die_before_they_read_are_not_made_for_ever(ray, files):
    with pytest.raises(RagKVError, match=f"{DEATHS} workers died before they could read anything"):
        gathered(cluster.read(files, made(making=signal.SIGKILL), Share(1, 1, 0), bar=False), {})


@pytest.mark.long
def test_what_a_worker_raises_is_raised_here(ray, files):
    with pytest.raises(UploadError, match=r"^the pool is away$"):
        gathered(cluster.read(files, made(raised=("c", UploadError("the pool is away"))), TWO, bar=False), {})
    with pytest.raises(RagKVError, match="a worker failed: ZeroDivisionError: nought"):
        gathered(cluster.read(files, made(raised=("c", ZeroDivisionError("nought"))), TWO, bar=False), {})
    with pytest.raises(ModelNotFoundError, match=r"^no such model$"):
        gathered(cluster.read(files, made(making=ModelNotFoundError("no such model")), TWO, bar=False), {})


@pytest.mark.long
def test_rows_of_a_dataset_come_as_they_are(ray, tmp_path, files):
    given = ray.data.from_items([{"source": path, "more": {"n": 1}} for batch in files for path in batch])
    report = gathered(cluster.read(given, made(), Share(1, 1, 0), bar=False), {})
    assert (report.documents, report.tokens_read, report.failed) == (6, 60, {})
    assert given.context.enable_progress_bars, "the settings of the Dataset were changed"


def test_a_cluster_is_shared():
    two_gpus = [{"CPU": 16, "GPU": 2}, {"CPU": 3.0}]
    assert cluster.share(two_gpus, None, None, None) == (2, 1, 1)
    assert cluster.share(two_gpus, None, None, 0.5) == (4, 1, 0.5)
    assert cluster.share(two_gpus, None, None, None, "cpu") == (4, 4, 0)
    assert cluster.share(two_gpus, None, 1, None, "cpu") == (19, 1, 0)
    assert cluster.share(two_gpus, 7, None, None) == (7, 1, 1)
    assert cluster.share([{"CPU": 2}], None, None, None) == (1, 2, 0)
    assert cluster.share([{"CPU": 2}], None, 1, None, None, 1) == (1, 1, 0), "a Dataset has to be read, too"
    for nodes, given, why in (
        ([{"CPU": 2}], (None, 4, None), "no machine"),
        ([], (None, None, None), "no machine"),
        ([{"CPU": 2}], (None, 0, None), "workers="),
        ([{"CPU": 2}], (None, None, None, "cuda"), "would have 0 GPUs"),
        (two_gpus, (None, None, 1, "cpu"), "would have 1 GPUs"),
    ):
        with pytest.raises(ArgumentError, match=why):
            cluster.share(nodes, *given)

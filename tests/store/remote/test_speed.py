"""How fast a pool is: by what came last, for a while."""

from concurrent.futures import Future

from ragkv.store.remote.speed import Speed


def test_the_last_chunks_count_and_not_for_ever():
    clock = [0.0]
    speed = Speed(lambda: clock[0])
    speed.sized("", 8.0)
    assert speed.loading is None
    slow, fast = ([(Future(), 600), (Future(), 400)] for _ in range(2))
    for asked, seconds in ((slow, 2.0), (fast, 0.5)):
        speed.watch(asked)
        asked[1][0].set_result(b"")
        before = speed.loading
        clock[0] += seconds
        asked[0][0].set_result(b"")
        assert speed.loading != before
        assert (speed.loading.bytes_per_s, speed.loading.token_bytes) == (1000 / seconds, 8.0)
    clock[0] += 59
    assert speed.loading is not None
    clock[0] += 2
    assert speed.loading is None


def test_how_long_headers_took_counts_for_a_minute():
    clock = [0.0]
    speed = Speed(lambda: clock[0])
    speed.started(2.0)
    clock[0] = 60.0
    assert speed.start_s == 2.0
    clock[0] = 61.0
    assert speed.start_s == 0.0


def test_what_was_not_answered_is_no_measure():
    speed = Speed()
    asked = [(Future(), 600), (Future(), 400), (Future(), 1)]
    speed.watch(asked)
    asked[0][0].set_exception(OSError("cut"))
    asked[1][0].cancel()
    asked[2][0].set_result(b"")
    assert speed.loading is None

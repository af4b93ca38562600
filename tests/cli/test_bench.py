"""ragkv bench store, with the bundled model on a few passages."""

import json

import pytest

from ragkv import bundled
from ragkv.cli import main


@pytest.fixture
def dataset(tmp_path):
    passages = [{"title": name, "text": text} for name, text in bundled.documents().items()]
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{"ctxs": passages}]))
    return file


def test_bench_store(dataset, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "policies.png"
    argv = ["bench", "store", "--dataset", str(dataset), "--requests", "500", "--seeds", "2"]
    assert main([*argv, "--json", "--plot", str(plot)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passages"] == len(bundled.documents()) and found["mean_tokens"] > 20
    assert found["prefill_seconds"]["0"] == 0 < found["prefill_seconds"]["16"]
    for stream in ("stationary", "drifting"):
        policies = found["streams"][stream]
        assert set(policies) == {"pgdsf", "lru", "lfu", "gdsf", "belady"}
        for policy in policies.values():
            assert policy["token_hit_rate"] == sorted(policy["token_hit_rate"])
            assert all(0 <= share < 1 for share in policy["saved_share"])
            assert policy["saved_seconds"][-1] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")

    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("hit rate by tokens\n") == out.count("prefill seconds saved\n") == 2
    assert out.count("\nbelady ") == 4


@pytest.mark.parametrize(("text", "reason"), [("{}", "ctxs"), ("[]", "no passages in it"), (None, "No such file")])
def test_no_dataset(tmp_path, capsys, text, reason):
    file = tmp_path / "data.json"
    if text is not None:
        file.write_text(text)
    assert main(["bench", "store", "--dataset", str(file)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and reason in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "argv", [[], ["store"], ["gpu", "--dataset", "x"], ["store", "--dataset", "x", "--seeds", "0"]]
)
def test_usage(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *argv])
    assert stopped.value.code == 2

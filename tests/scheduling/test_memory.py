"""What is free: the least of what the system and the control group leave."""

import os

import pytest
import torch

from ragkv.scheduling import memory

CPU = torch.device("cpu")


def test_this_machine_says_what_it_has():
    free = memory.free_bytes(CPU)
    assert free is None or free > 0
    assert memory.free_bytes(torch.device("meta")) is None


@pytest.mark.parametrize(("limit", "left"), [("max", None), (str(10 << 20), (10 << 20) - (3 << 20) + (1 << 20))])
@pytest.mark.parametrize("own", ["/", "/system.slice/rag.service", "/system.slice", "/system.slice/\udcff.service"])
def test_a_control_group_limits_it(tmp_path, monkeypatch, limit, left, own):
    before = memory.free_bytes(CPU)
    limited = tmp_path / "groups" / ("" if own == "/" else "system.slice")  # the service's own has no limit
    limited.mkdir(parents=True)
    (limited / "memory.max").write_text(limit + "\n")
    (limited / "memory.current").write_text(f"{3 << 20}\n")
    (limited / "memory.stat").write_text(f"anon 1\ninactive_file {1 << 20}\n")
    (tmp_path / "cgroup").write_bytes(os.fsencode(f"1:cpu:/old\n0::{own}\n"))
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "groups")
    monkeypatch.setattr(memory, "_OWN", tmp_path / "cgroup")
    found = memory.free_bytes(CPU)
    assert found == left if left is not None else (found is None) == (before is None)


class Gpu:
    """Counts how often it is asked."""

    def __init__(self, monkeypatch):
        self.asked = []
        for name in ("mem_get_info", "memory_stats_as_nested_dict"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for name in ("memory_stats", "memory_reserved", "memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda device: pytest.fail("flattens all statistics"))

    def mem_get_info(self, device):
        self.asked.append("driver")
        return 1000, 5000

    def memory_stats_as_nested_dict(self, device):
        self.asked.append("allocator")
        kinds = {"reserved_bytes": 700, "allocated_bytes": 200}
        return {name: {"all": {"current": count}, "small_pool": {"current": 1}} for name, count in kinds.items()}


def test_a_gpu_gives_what_pytorch_does_not_use(monkeypatch):
    gpu = Gpu(monkeypatch)
    assert memory.free_bytes(torch.device("cuda", 0)) == 1500
    assert sorted(gpu.asked) == ["allocator", "driver"]


def test_an_answer_stands_for_some_milliseconds(monkeypatch):
    gpu, now, there = Gpu(monkeypatch), [0.0], torch.device("cuda", 0)
    monkeypatch.setattr(memory, "perf_counter", lambda: now[0])
    free = memory.Free()
    assert [free.bytes(there) for _ in range(3)] == [1500] * 3 and len(gpu.asked) == 2
    free.bytes(torch.device("cuda", 1))
    assert len(gpu.asked) == 4
    now[0] = 0.006
    assert free.bytes(there) == 1500 and len(gpu.asked) == 6
    free.forget()
    assert free.bytes(there) == 1500 and len(gpu.asked) == 8

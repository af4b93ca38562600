"""What is free: the least of what the system and the control group leave."""

import pytest
import torch

from ragkv.scheduling import memory

CPU = torch.device("cpu")


def test_this_machine_says_what_it_has():
    free = memory.free_bytes(CPU)
    assert free is None or free > 0
    assert memory.free_bytes(torch.device("meta")) is None


@pytest.mark.parametrize(("limit", "left"), [("max", None), (str(10 << 20), (10 << 20) - (3 << 20) + (1 << 20))])
@pytest.mark.parametrize("own", ["/", "/system.slice/rag.service", "/system.slice"])
def test_a_control_group_limits_it(tmp_path, monkeypatch, limit, left, own):
    before = memory.free_bytes(CPU)
    limited = tmp_path / "groups" / ("" if own == "/" else "system.slice")  # the service's own has no limit
    limited.mkdir(parents=True)
    (limited / "memory.max").write_text(limit + "\n")
    (limited / "memory.current").write_text(f"{3 << 20}\n")
    (limited / "memory.stat").write_text(f"anon 1\ninactive_file {1 << 20}\n")
    (tmp_path / "cgroup").write_text(f"1:cpu:/old\n0::{own}\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "groups")
    monkeypatch.setattr(memory, "_OWN", tmp_path / "cgroup")
    found = memory.free_bytes(CPU)
    assert found == left if left is not None else (found is None) == (before is None)


def test_a_gpu_gives_what_pytorch_does_not_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert memory.free_bytes(torch.device("cuda", 0)) == 1500

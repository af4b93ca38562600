"""Every kernel is launched on the device of its tensors, whichever is the current one, and with the same options."""

import pytest
import torch

from ragkv.kernels import deviation, key_spans, place, scatter, scored_attention, selective_attention
from ragkv.kernels.triton_impl import launch


class Guarded:
    """A kernel that tells on which device it would run, and with what."""

    def __init__(self, seen, current):
        self.seen, self.current = seen, current

    def __getitem__(self, grid):
        return lambda *args, **fixed: self.seen.append((self.current[-1], fixed))


def test_a_launch_goes_to_the_device_of_its_tensors(monkeypatch):
    current, seen = [0], []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device.index)

        def __exit__(self, *exc):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Device)
    for device in (torch.device("cuda", 1), torch.device("cuda", 0), torch.device("cpu")):
        launch.launch(Guarded(seen, current), (1,), device, 1, NAME=2)
    assert [device for device, _ in seen] == [1, 0, 0] and current == [0]
    assert all(fixed == {"NAME": 2, "enable_fp_fusion": True} for _, fixed in seen)  # whatever this Triton's default is


@pytest.mark.parametrize("operation", ["place", "scatter", "deviation", "selective_attention", "scored_attention"])
def test_every_operation_launches_so(operation, random, device, monkeypatch):
    keys, query, rows = random(2, 40, 64), random(4, 5, 64), torch.arange(5, device=device)
    spans = key_spans(rows + 30)
    run = {
        "place": lambda: place(keys[:, :5].clone(), random(2, 5, 64), impl="triton"),
        "scatter": lambda: scatter(random(2, 5, 64), random(2, 5, 64), rows, keys, keys.clone(), impl="triton"),
        "deviation": lambda: deviation(random(2, 40, 64), keys, impl="triton"),
        "selective_attention": lambda: selective_attention(query, keys, keys, spans, impl="triton"),
        "scored_attention": lambda: scored_attention(
            query, keys, keys, spans, torch.ones(5, device=device), impl="triton"
        ),
    }[operation]
    devices = []
    for module in ("attention", "place", "scatter", "scores"):
        name = f"ragkv.kernels.triton_impl.{module}.launch"

        def noted(kernel, grid, where, *args, **fixed):
            devices.append(where)
            launch.launch(kernel, grid, where, *args, **fixed)

        monkeypatch.setattr(name, noted)
    run()
    assert devices and all(where == keys.device for where in devices)

"""Times by stage: the host's clock, and events in a device's stream."""

import pytest
import torch

from ragkv import CacheBlend, Engine, PromptTemplate, Reuse
from ragkv.fusion import timing
from ragkv.fusion.timing import EventClock, Timer
from ragkv.testing import random_ids, tiny_model


class Device:
    """A device's module whose work takes time that the host does not wait for."""

    def __init__(self):
        self.ready = {}  # by device, when its stream has done what it was given
        self.waits = 0

    def work(self, device, seconds):
        self.ready[device] = self.ready.get(device, 0.0) + seconds

    def current_stream(self, device):
        return Stream(self, device)

    def Event(self, enable_timing=False):
        return Event(self)


class Stream:
    def __init__(self, owner, device):
        self.owner, self.device = owner, device

    def record_event(self, event=None):
        event = event or Event(self.owner)
        event.at = self.owner.ready.get(self.device, 0.0)
        return event

    def wait_event(self, event):
        self.owner.ready[self.device] = max(self.owner.ready.get(self.device, 0.0), event.at)


class Event:
    def __init__(self, owner):
        self.owner, self.at = owner, 0.0

    def synchronize(self):
        self.owner.waits += 1

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


def test_a_stage_inside_another_interrupts_it(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    spend(5)
    timer = Timer(begin=3.0)
    with timer.stage("select"):
        spend(10)
        with pytest.raises(KeyError), timer.stage("place"):
            spend(100)
            raise KeyError
        spend(1000)
    spend(1)  # nobody's; what comes behind the last stage is not the prompt's
    with timer.stage("compute"):
        spend(10_000)
    spend(7)
    assert timer.milliseconds() == {
        "read": 0, "place": 100e3, "select": 1010e3, "compute": 10_000e3, "total": 11_113e3,
    }  # fmt: skip


def test_a_devices_time_is_that_of_its_work():
    device = Device()
    timer = Timer(EventClock(device, [FIRST, SECOND]))
    with timer.stage("place"):
        device.work(FIRST, 2.0)
    with timer.stage("compute"):
        device.work(FIRST, 3.0)
        device.work(SECOND, 9.0)  # the last layers, on another device
    assert device.waits == 0  # nothing waited for it while it worked
    spent = timer.milliseconds()
    assert spent["place"] == pytest.approx(2e3) and spent["compute"] == pytest.approx(7e3)
    assert spent["total"] == pytest.approx(9e3)
    waits = device.waits
    assert timer.milliseconds() == spent and device.waits == waits > 0


@pytest.mark.parametrize("method", [Reuse(), CacheBlend(0.2, check_layer=2)])
def test_a_prompt_waits_for_no_event_until_its_report_is_read(method, monkeypatch):
    """The model's work is given to a device that is slow; launching takes no time on the host."""
    device, model = Device(), tiny_model()
    monkeypatch.setattr("ragkv.fusing.clock", lambda devices: EventClock(device, [FIRST]))
    model.register_forward_pre_hook(lambda *_: device.work(FIRST, 50.0))
    engine = Engine(model, template=PromptTemplate(prefix=[1]))
    chunks = engine.add([random_ids(20), random_ids(30)])
    prompt = engine.fuse(chunks, random_ids(4), method=method)
    assert device.waits == 0
    spent = prompt.report.milliseconds
    assert spent["compute"] == pytest.approx(50e3) and spent["total"] == pytest.approx(50e3, rel=0.5)
    assert prompt.report.as_dict()["milliseconds"] == spent and "timer" not in prompt.report.as_dict()


def test_which_clock():
    assert isinstance(timing.clock([torch.device("cpu")]), timing.HostClock)
    found = timing.clock([FIRST, SECOND, FIRST])
    assert isinstance(found, EventClock) and found._module is torch.cuda and found._others == [SECOND]

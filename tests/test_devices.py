"""Devices: which there are, in which precision and layout, and how they are timed."""

import pytest
import torch

from autofed import devices
from autofed.devices import arithmetic, pick_device, place, seconds
from autofed.network import build
from autofed.problems import Problems
from tests.plans_made import small_plan


def test_devices():
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(Problems, match="cuda is not here"):
            pick_device("cuda")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_an_accelerator_is_waited_for(monkeypatch, device):
    waits = []
    monkeypatch.setattr(getattr(torch, device), "synchronize", lambda: waits.append(device))
    devices.wait(device)
    devices.wait("cpu")
    assert waits == [device]


def test_the_clock_starts_and_stops_when_the_device_is_idle(monkeypatch):
    seen = []
    monkeypatch.setattr(devices, "wait", lambda device: seen.append("wait"))
    monkeypatch.setattr(devices.time, "perf_counter", lambda: float(seen.append("clock") or len(seen)))
    seconds(lambda: seen.append("work"), "cuda", repeats=1)
    assert seen == ["work", "wait", "clock", "work", "wait", "clock"]


def test_the_fastest_of_several_runs_counts(monkeypatch):
    clock = iter([0.0, 5.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(clock))
    assert seconds(lambda: None, "cpu", repeats=3) == 2.0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_convolutions_compute_in_the_precision_asked_for(precision):
    network = small_plan().local.network
    with arithmetic(precision, "cpu"):
        logits = build(network, seed=0)(torch.randn(1, 1, 16, 16, 16))
    assert {x.dtype for x in logits} == {getattr(torch, precision)}


def test_the_layout_changes_no_result():
    network = small_plan().local.network
    module, image = build(network, seed=0), torch.randn(1, 1, 16, 16, 16)
    plain = [x.detach().clone() for x in module(image)]
    placed = place(image, network, "cpu")
    assert placed.is_contiguous(memory_format=torch.channels_last_3d)
    again = place(module, network, "cpu")(placed)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(plain, again, strict=True))

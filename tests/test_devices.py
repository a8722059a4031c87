"""Devices: which there are, in which precision and layout, and how they are timed."""

import numpy as np
import pytest
import torch

from autofed.errors import ValidationErrors
from autofed.training import devices, fit
from autofed.training.batches import PatchBatch
from autofed.training.devices import (
    autocast,
    compiled,
    pick_device,
    place,
    prepare_device,
    shortest_seconds,
    to_device,
)
from autofed.training.network import build
from tests.plans_made import small_plan


def test_devices():
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(ValidationErrors, match="cuda is not here"):
            pick_device("cuda")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_an_accelerator_is_waited_for(monkeypatch, device):
    waits = []
    monkeypatch.setattr(getattr(torch, device), "synchronize", lambda: waits.append(device))
    devices.synchronise(device)
    devices.synchronise("cpu")
    assert waits == [device]


def test_the_clock_starts_and_stops_when_the_device_is_idle(monkeypatch):
    seen = []
    monkeypatch.setattr(devices, "synchronise", lambda device: seen.append("wait"))
    monkeypatch.setattr(devices.time, "perf_counter", lambda: float(seen.append("clock") or len(seen)))
    shortest_seconds(lambda: seen.append("work"), "cuda", repeats=1)
    assert seen == ["work", "wait", "clock", "work", "wait", "clock"]


def test_the_fastest_of_several_runs_counts(monkeypatch):
    clock = iter([0.0, 5.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(clock))
    assert shortest_seconds(lambda: None, "cpu", repeats=3) == 2.0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_convolutions_compute_in_the_precision_asked_for(precision):
    network = small_plan().local.network
    with autocast(precision, "cpu"):
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


def test_float16_is_refused_on_a_cpu_with_what_to_write():
    with pytest.raises(ValidationErrors, match="training.precision=bfloat16"):
        prepare_device("cpu", "float16")
    prepare_device("cuda", "bfloat16")


def test_cuda_multiplies_in_tf32_and_tries_its_algorithms_and_a_cpu_is_left_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", seen.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    prepare_device("cpu", "float32")
    assert seen == [] and not torch.backends.cudnn.benchmark
    prepare_device("cuda", "float32")
    assert seen == ["high"] and torch.backends.cudnn.benchmark


def test_patches_go_to_cuda_from_pinned_memory_while_the_host_goes_on(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: seen.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **how: seen.append((device, how)) or self)
    to_device(np.zeros(3), "cuda")
    assert seen == ["pinned", ("cuda", {"non_blocking": True})]
    to_device(np.zeros(3), "cpu")
    assert seen[2:] == [("cpu", {})]


@pytest.mark.parametrize(
    ("wanted", "device", "system", "done"),
    [(True, "cuda", "linux", True), (False, "cuda", "linux", False), (True, "cuda", "win32", False),
     (True, "mps", "darwin", False), (True, "cpu", "linux", False)],
)  # fmt: skip
def test_only_cuda_compiles_and_only_if_asked(monkeypatch, wanted, device, system, done):
    monkeypatch.setattr(torch, "compile", lambda module: "compiled")
    monkeypatch.setattr(devices.sys, "platform", system)
    module = torch.nn.Identity()
    assert compiled(module, wanted, device) == ("compiled" if done else module)


def test_a_compiled_network_keeps_the_names_of_its_weights(monkeypatch):
    local = small_plan().local
    calls = []
    wrap = lambda module, *_: torch.nn.ModuleDict({"_orig_mod": module})  # noqa: E731
    monkeypatch.setattr(torch.nn.ModuleDict, "__call__", lambda self, x: calls.append(1) or self["_orig_mod"](x))
    monkeypatch.setattr(fit, "compiled", wrap)
    learner = fit.Learner(local.network, local.training, "cpu")
    learner.gradient(some_patches(), [])
    assert calls and list(dict(learner.module.named_parameters())) == list(
        dict(build(local.network).named_parameters())
    )


def some_patches():
    image = np.random.default_rng(0).standard_normal((1, 1, 16, 16, 16), np.float32)
    return PatchBatch(image, (image > 0).astype(np.int16))


def gradient(monkeypatch, scales, larger=1.0):
    """A gradient with the scales of the loss set, of a loss that is so much larger, and the losses noted."""
    monkeypatch.setattr(fit, "loss_scales", lambda _: scales)
    local, losses = small_plan().local, []
    torch.manual_seed(0)
    learner = fit.Learner(local.network, local.training, "cpu")
    plain = learner._loss
    learner._loss = lambda logits, label: plain(logits, label) * larger
    return learner.gradient(some_patches(), losses), losses


def test_the_scale_of_the_loss_leaves_no_trace_in_the_gradient(monkeypatch):
    plain, loss = gradient(monkeypatch, (1.0,))
    scaled, same = gradient(monkeypatch, devices.loss_scales("float16"))
    assert loss == same
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-9) for a, b in zip(plain, scaled, strict=True))


def test_a_pass_that_overflows_is_taken_again_with_a_smaller_scale(monkeypatch):
    expected, _ = gradient(monkeypatch, (1.0,), larger=1e30)
    found, losses = gradient(monkeypatch, (1e30, 2.0**4, 1.0), larger=1e30)
    assert len(losses) == 1 and np.isfinite(losses).all()
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(expected, found, strict=True))


def test_a_network_that_overflows_gives_no_gradient_and_no_loss(monkeypatch):
    found, losses = gradient(monkeypatch, (2.0, 1.0), larger=float("inf"))
    assert losses == [] and all(not part.any() for part in found)

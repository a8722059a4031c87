"""The speed of a device: costs that explain what was timed, for the planner to add up."""

import pytest

from autofed.plans import Speed
from autofed.training import speed
from autofed.training.speed import fit_costs, measure_speed
from tests.plans_made import small_plan


@pytest.mark.parametrize("dimension", [2, 3])
def test_costs_are_found_again(dimension):
    probes = [speed._probe("cpu", dimension, 1, w, e) for w, e in speed._probes("cpu", dimension)]
    true = Speed(
        seconds_per_step=0.01, seconds_per_gigaelement=0.7, seconds_per_teraflop=3.0, seconds_per_megavoxel=0.0
    )
    times = [true.seconds(network, t.patch_size, t.batch_size) for network, t in probes]
    assert fit_costs(probes, times) == pytest.approx((0.01, 0.7, 3.0), rel=1e-6)


def test_no_cost_is_below_zero():
    probes = [speed._probe("cpu", 2, 1, w, e) for w, e in speed._probes("cpu", 2)]
    assert min(fit_costs(probes, [1.0, 0.5, 0.1])) >= 0


def test_the_precision_is_the_faster_one(monkeypatch):
    for factor, chosen in ((0.5, "bfloat16"), (0.95, "float32"), (2.0, "float32")):
        monkeypatch.setattr(speed, "_time", lambda p, d, precision, f=factor: f if precision == "bfloat16" else 1.0)
        monkeypatch.setattr(speed, "_loading_seconds", lambda training, channels: 0.1)
        assert measure_speed("cpu", 2).precision == chosen


def test_a_device_without_the_precision_is_used_without_it(monkeypatch):
    def time(probe, device, precision):
        if precision == "bfloat16":
            raise RuntimeError("bfloat16 is not implemented here")
        return 1.0

    monkeypatch.setattr(speed, "_time", time)
    assert measure_speed("cpu", 2).precision == "float32"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_real_device_has_a_speed(monkeypatch, channels):
    monkeypatch.setattr(speed, "_EDGES", {"cpu": {2: (16, 32)}})
    found = measure_speed("cpu", 2, channels)
    assert found.seconds_per_megavoxel > 0
    assert found.seconds(small_plan((1, 64, 64)).local.network, (64, 64), 2) > 0

"""The demo's plan on machines that are slow, or busy with something else."""

from types import SimpleNamespace

import pytest

from autofed.api import demo
from autofed.parallel import silent


@pytest.mark.parametrize(("steps_an_hour", "asked"), [(12_000, [0.05]), (1_200, [0.05, 0.125])])
def test_a_slow_machine_takes_longer_for_as_many_steps_as_it_takes(monkeypatch, steps_an_hour, asked):
    hours_of = []

    def plan(sites, *, hours, **_):
        hours_of.append(hours)
        training = SimpleNamespace(rounds=10, steps_per_round=round(steps_an_hour * hours / 10))
        return SimpleNamespace(agreement=SimpleNamespace(training=training), local=SimpleNamespace(training=training))

    monkeypatch.setattr(demo.api, "plan", plan)
    made = demo._plan([], minutes=3, processes=1, progress=silent)
    assert hours_of == pytest.approx(asked)
    assert made.agreement.training.rounds * made.local.training.steps_per_round >= demo.FEWEST_STEPS

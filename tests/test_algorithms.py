"""Algorithms on quadratics, where it is known where they end; and how far local solvers reach."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
import torch

from autofed import algorithms
from autofed.algorithms import RunSetup
from autofed.algorithms.fedavg import FedAvg
from autofed.algorithms.fedbn import FedBN
from autofed.algorithms.fednova import FedNova
from autofed.algorithms.fedprox import FedProx
from autofed.algorithms.local import LocalOnly
from autofed.algorithms.scaffold import Scaffold
from autofed.errors import ValidationErrors
from autofed.federation.aggregation import Aggregator
from autofed.messages import Request, Response
from autofed.training.effective_steps import effective_steps
from autofed.training.fit import LocalResult
from tests.plans_made import small_plan

RATE = 0.05


@dataclass
class Quadratic:
    """A site that minimises curvature/2 ||w - centre||^2 in so many steps of plain gradient descent a round."""

    name: str
    centre: float
    curvature: float = 1.0
    steps: int = 5
    patients: int = 1
    rate: float = RATE
    normalisation: tuple = ("norm",)
    remembered: dict = field(default_factory=dict)
    others: list = field(default_factory=list)

    def fit(self, weights, *, proximal=0.0, correction=None):
        found = {}
        for name, start in weights.items():
            w = start.astype(np.float64)
            for _ in range(self.steps):
                gradient = self.curvature * (w - self.centre) + proximal * (w - start)
                w = w - self.rate * (gradient + (0 if correction is None else correction[name]))
            found[name] = w.astype(np.float32)
        return LocalResult(found, np.zeros(1, np.float32), effective_steps([self.rate] * self.steps, proximal=proximal))

    def mean_effective_steps(self, proximal=0.0):
        ways = [site.patients * effective_steps([site.rate] * site.steps, proximal=proximal) for site in self.others]
        return sum(ways) / sum(site.patients for site in self.others)

    def memory(self):
        return self.remembered or None

    def remember(self, groups):
        self.remembered = dict(groups)


def end(algorithm, sites, rounds=400, *, silent=lambda round, site: False, first=("w",)):
    """The state after so many rounds; a silent site computes nothing in that round."""
    patients = {site.name: site.patients for site in sites}
    plan = small_plan().change({"agreement.patients": patients, "faults.least_sites": 1})
    for site in sites:
        site.others = sites
    state = algorithm.start(RunSetup(plan, {name: np.zeros(2, np.float32) for name in first}))
    for round in range(1, rounds + 1):
        request = Request("r", round, "train", state.shared)
        asked = [site for site in sites if not silent(round, site)]
        releases = [Response("r", round, site.name, algorithm.local(site, request)) for site in asked]
        state = algorithm.merge(state, releases, Aggregator.of(plan, patients).average)
    return state


def weight(state):
    return float(state.shared["weights"]["w"][0])


def optimum(sites):
    """Where the sum of the sites' losses, weighted by patients, is least."""
    shares = np.array([site.patients * site.curvature for site in sites])
    return float((shares * [site.centre for site in sites]).sum() / shares.sum())


def test_fednova_is_unbiased_where_fedavg_is_not():
    """One site takes twenty times as many steps as the other: fedavg ends near it, fednova where both are content."""
    uneven = lambda: [Quadratic("a", 0.0, steps=1, rate=1e-3), Quadratic("b", 1.0, steps=20, rate=1e-3)]  # noqa: E731
    target = optimum(uneven())
    assert target == 0.5
    assert weight(end(FedAvg(), uneven(), 2000)) > 0.9
    assert weight(end(FedNova(), uneven(), 2000)) == pytest.approx(target, abs=0.01)


def test_at_equal_steps_fednova_is_fedavg():
    sites = lambda: [Quadratic("a", 0.0, patients=2), Quadratic("b", 1.0, curvature=3, patients=5)]  # noqa: E731
    for rounds in (1, 7):
        assert weight(end(FedNova(), sites(), rounds)) == pytest.approx(
            weight(end(FedAvg(), sites(), rounds)), rel=1e-5
        )


def test_scaffold_reaches_the_optimum_where_fedavg_stops_short():
    sites = lambda: [Quadratic("a", 0.0, steps=10), Quadratic("b", 1.0, curvature=9, steps=10)]  # noqa: E731
    target = optimum(sites())
    assert target == pytest.approx(0.9)
    assert abs(weight(end(FedAvg(), sites())) - target) > 0.1
    assert weight(end(Scaffold(), sites())) == pytest.approx(target, abs=1e-4)


def test_scaffold_reaches_it_with_sites_that_take_turns_in_being_silent():
    sites = [Quadratic("a", 0.0, steps=4), Quadratic("b", 1.0, curvature=5, steps=8), Quadratic("c", 3.0, patients=2)]
    found = end(Scaffold(), sites, 1500, silent=lambda round, site: ord(site.name) % 3 == round % 3)
    assert weight(found) == pytest.approx(optimum(sites), abs=2e-3)


def test_the_common_control_variate_is_the_average_of_the_sites():
    sites = [Quadratic("a", 0.0, patients=3), Quadratic("b", 1.0, curvature=5)]
    found = end(Scaffold(), sites, 11, silent=lambda round, site: round > 1 and round % 2 == (site.name == "a"))
    own = (3 * sites[0].remembered["control"]["w"] + sites[1].remembered["control"]["w"]) / 4
    assert found.shared["control"]["w"] == pytest.approx(own, abs=1e-5)


def test_fedprox_stops_where_the_pull_back_is_as_strong_as_the_loss():
    """The least of a/2 (w - b)^2 + mu/2 w^2 is a b / (a + mu)."""
    site = Quadratic("a", 1.0, curvature=2.0, steps=2000)
    assert weight(end(FedProx(mu=3.0), [site], 1)) == pytest.approx(2 / 5, abs=1e-4)
    assert weight(end(FedProx(mu=0.0), [site], 1)) == weight(end(FedAvg(), [site], 1))


def test_fedbn_keeps_normalisation_layers_at_the_sites_and_averages_them_for_others():
    sites = [Quadratic("a", 0.0, patients=3), Quadratic("b", 1.0)]
    found = end(FedBN(), sites, 300, first=("w", "norm")).shared["weights"]
    own = [site.remembered["weights"] for site in sites]
    assert own[0]["norm"] == pytest.approx(0, abs=1e-3) and own[1]["norm"] == pytest.approx(1, abs=1e-3)
    assert found["norm"] == pytest.approx(0.25, abs=1e-3)  # the rule for a hospital that was not in the training
    assert found["w"] == pytest.approx(0.25, abs=1e-3)


def test_local_models_end_at_their_own_site():
    sites = [Quadratic("a", 0.0), Quadratic("b", 1.0)]
    end(LocalOnly(), sites, silent=lambda round, site: round < 3 and site.name == "b")  # joins late, from the start
    assert [float(site.remembered["weights"]["w"][0]) for site in sites] == pytest.approx([0, 1], abs=1e-4)


# --- what an algorithm states of itself


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"personalized": True}, "did you mean personalised"),
        (
            {"reset_momentum": True, "__annotations__": {"reset_momentum": ClassVar[bool]}},
            "did you mean resets_momentum",
        ),
        ({"misfit": lambda self, arrays, shared: []}, "did you mean misfits"),
        ({"momentum": 0.9}, "a hyper-parameter is written momentum: float"),
        ({"personalised": True, "__annotations__": {"personalised": bool}}, "write personalised: ClassVar"),
        ({"personalized": 1, "centralized": 1}, "did you mean personalised.*; .*did you mean centralised"),
    ],
)
def test_a_slip_of_the_pen_is_an_error(body, said):
    with pytest.raises(TypeError, match=f"^Odd: .*{said}"):
        type("Odd", (FedAvg,), body)


def test_what_an_algorithm_may_well_have():
    body = {
        "personalised": True, "preset": "resenc-m", "share": 0.5, "train": FedAvg.local, "_rule": 3, "LIMIT_": None,
        "half": property(lambda self: self.share / 2), "__annotations__": {"share": float, "LIMIT_": int},
    }  # fmt: skip
    kind = dataclass(frozen=True)(type("Fine", (FedAvg,), body))
    assert (kind.personalised, kind.preset, kind.centralised, kind(share=0.25).half) == (True, "resenc-m", False, 0.125)


def test_an_algorithm_that_lacks_a_part_is_refused():
    with pytest.raises(ValidationErrors, match="expected a frozen dataclass that extends autofed.algorithms.Algorithm"):
        algorithms.find("tests.test_algorithms:Partial", trusted=("tests.test_algorithms:Partial",))


@dataclass(frozen=True)
class Partial(algorithms.Algorithm):
    def start(self, setup): ...


def test_a_plan_is_judged_by_what_the_algorithm_states_and_no_foreign_code_is_run_for_it():
    assert algorithms.stated("pooled").centralised and algorithms.stated("dcfed").shares_pseudo_labels
    assert algorithms.stated("tests.test_algorithms:Partial") is algorithms.stated("none") is algorithms.Algorithm
    assert [name for name in algorithms.names() if not algorithms.stated(name).shares_weights()] == ["dcfed", "local"]


# --- how far local steps reach


def test_the_reach_of_the_solvers_of_the_paper():
    steps, rho = 7, 0.9
    c = [(1 - rho ** (k + 1)) / (1 - rho) for k in range(steps)]
    assert effective_steps([1.0] * steps) == steps
    assert effective_steps([1.0] * steps, momentum=rho) == pytest.approx(sum(c))
    assert effective_steps([1.0] * steps, momentum=rho, nesterov=True) == pytest.approx(sum(1 + rho * x for x in c))
    decayed = [(1 - 0.1 * 0.5) ** k for k in range(steps)]
    assert effective_steps([0.1] * steps, proximal=0.5) == pytest.approx(0.1 * sum(decayed))
    assert effective_steps([0.1, 0.2, 0.3]) == pytest.approx(0.6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("proximal", [0.0, 0.7])
def test_reach_is_what_torch_does_along_a_constant_gradient(momentum, nesterov, proximal):
    nesterov = nesterov and momentum > 0
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimiser = torch.optim.SGD([parameter], lr=1, momentum=momentum, nesterov=nesterov)
    rates = [0.3, 0.2, 0.2, 0.05]
    for rate in rates:
        optimiser.param_groups[0]["lr"] = rate
        parameter.grad = torch.ones(1, dtype=torch.float64) + proximal * parameter.detach()
        optimiser.step()
    assert -float(parameter.detach()) == pytest.approx(effective_steps(rates, momentum, nesterov, proximal))

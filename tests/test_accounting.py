"""What events cost, against published figures, closed forms and an accountant that shares no line with ours."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from autofed.errors import ValidationErrors
from autofed.privacy import accounting
from autofed.privacy.accounting import (
    best_order,
    calibrate,
    default_delta,
    epsilon,
    merged,
    protection,
    renyi,
    renyi_epsilon,
    renyi_room,
    roomy_order,
    success_rate,
)
from autofed.privacy.events import PrivacyEvent

DELTA = 1e-5


def sampled(steps, noise, rate, **more):
    return PrivacyEvent(mechanism="dp-sgd", steps=steps, noise_multiplier=noise, sampling_rate=rate, **more)


def gaussian_delta(noise, epsilon):
    """Balle and Wang 2018, theorem 8: the exact delta of a Gaussian."""
    return norm.cdf(0.5 / noise - epsilon * noise) - math.exp(epsilon) * norm.cdf(-0.5 / noise - epsilon * noise)


def sampled_delta(noise, rate, steps, epsilon, width=1e-3, most=40.0):
    """The delta of a Poisson-sampled Gaussian from its two densities alone, in the worse direction.

    The distribution of a step's loss on a grid, to the nearest point, by differences of its distribution function;
    that of all steps by FFT.
    """
    losses = np.arange(-most, most, width)

    def reached(removed):  # the chance of at least a loss
        sign = 1 if removed else -1
        ratio = (np.exp(sign * (losses - width / 2)) - (1 - rate)) / rate
        outcome = noise**2 * np.log(np.maximum(ratio, 1e-300)) + 0.5
        if removed:
            return rate * norm.sf((outcome - 1) / noise) + (1 - rate) * norm.sf(outcome / noise)
        return norm.cdf(outcome / noise)

    def delta(removed):
        mass = -np.diff(reached(removed), append=0.0)
        total = np.fft.fftshift(np.fft.irfft(np.fft.rfft(np.fft.ifftshift(mass)) ** steps, len(mass)))
        return float(np.sum(total * np.maximum(-np.expm1(epsilon - losses), 0)))

    return max(delta(True), delta(False))


# --- figures of others


def test_published_figures():
    spent = [sampled(5000, 1.0, 0.02)]
    assert epsilon(spent, DELTA) == pytest.approx(9.403, abs=0.002)
    best = best_order(spent, DELTA)
    assert best == 3 and 10.186 <= renyi_epsilon(spent, DELTA, best) < 10.186 * 1.01  # theirs is at order 2.9


def test_the_moments_accountant_of_abadi():
    """Abadi et al. 2016, section 3.2 and figure 2: q .01, sigma 4, delta 1e-5; epsilon 1.26 after 10 000 steps."""
    spent = [sampled(10_000, 4.0, 0.01)]
    assert renyi_epsilon(spent, DELTA, best_order(spent, DELTA)) < 1.26
    assert 0.8 < epsilon(spent, DELTA) < renyi_epsilon(spent, DELTA, best_order(spent, DELTA))


@pytest.mark.parametrize("noise", [0.3, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("steps", [1, 50])
def test_a_gaussian_is_exact(noise, steps):
    found = epsilon([PrivacyEvent(mechanism="feddp", steps=steps, noise_multiplier=noise)], DELTA)
    assert gaussian_delta(noise / math.sqrt(steps), found) == pytest.approx(DELTA, rel=1e-6)


@pytest.mark.parametrize(("rate", "noise", "steps"), [(0.2, 1.9, 200), (0.05, 1.0, 300), (0.5, 3.0, 50), (0.2, 1.0, 1)])
def test_an_accountant_of_another_make_agrees(rate, noise, steps):
    found = epsilon([sampled(steps, noise, rate)], DELTA)
    assert sampled_delta(noise, rate, steps, found * 0.998) > DELTA
    assert sampled_delta(noise, rate, steps, found * 1.002) < DELTA


@pytest.mark.parametrize(("rate", "noise", "steps"), [(0.001, 3.0, 10_000), (0.01, 20.0, 1000)])
def test_many_steps_of_little_loss_are_not_overstated(rate, noise, steps):
    """A grid of 1e-3 says half as much again; with so many small losses the sum is all but normal."""
    normal = 1 / math.sqrt(steps * rate**2 * math.expm1(noise**-2))
    found = epsilon([sampled(steps, noise, rate)], DELTA)
    assert gaussian_delta(normal, found * 0.97) > DELTA > gaussian_delta(normal, found * 1.03)


def test_divergences_are_those_of_the_library():
    from dp_accounting import NeighboringRelation, rdp

    for order in (2, 3, 17, 256):
        for spent in (
            [sampled(7, 0.8, 0.3)],
            [sampled(1000, 9.0, 0.001)],
            [sampled(3, 2.0, 1.0), sampled(5, 1.0, 0.1)],
        ):
            library = rdp.RdpAccountant([order], NeighboringRelation.REPLACE_SPECIAL)
            library.compose(accounting.dp_event(spent))
            assert renyi_epsilon(spent, DELTA, order) == pytest.approx(library.get_epsilon(DELTA), rel=1e-9)


@pytest.mark.parametrize(("rate", "noise", "order"), [(Fraction(1, 100), 4.0, 5), (Fraction(1, 1000), 30.0, 9)])
def test_a_small_divergence_keeps_its_digits(rate, noise, order):
    """The sum of Mironov et al. 2019, section 3.3, with exact weights: what is beyond 1 is 1e-5 and less of it."""
    beyond = sum(
        float(math.comb(order, k) * rate**k * (1 - rate) ** (order - k)) * math.expm1((k * k - k) / (2 * noise**2))
        for k in range(2, order + 1)
    )
    assert renyi([sampled(1, noise, float(rate))], order) == pytest.approx(math.log1p(beyond) / (order - 1), rel=1e-12)


# --- what must hold whatever the figures

noises, rates, steps_ = st.floats(0.8, 20), st.floats(0.01, 1), st.integers(1, 300)


@settings(max_examples=8, deadline=None)
@given(noises, rates, steps_, st.sampled_from(["noise", "rate", "steps", "delta"]))
def test_more_noise_less_sampling_and_fewer_steps_never_cost_more(noise, rate, steps, changed):
    less = {"noise": noise * 1.1, "rate": rate * 0.9, "steps": steps, "delta": DELTA}
    less = {"noise": noise, "rate": rate, "steps": steps, "delta": DELTA} | {changed: less[changed]}
    less |= {"steps": steps // 2} if changed == "steps" else {"delta": DELTA * 2} if changed == "delta" else {}
    costs, divergences = [], []
    for case in ({"noise": noise, "rate": rate, "steps": steps, "delta": DELTA}, less):
        spent = [sampled(case["steps"], case["noise"], case["rate"])]
        costs.append(epsilon(spent, case["delta"]))
        divergences.append(renyi(spent, 8))
    assert costs[1] <= costs[0] * 1.0005  # so far the grid may differ
    assert divergences[1] <= divergences[0]


@settings(max_examples=8, deadline=None)
@given(noises, rates, steps_, st.integers(2, 64))
def test_no_order_proves_less_than_the_loss_distribution(noise, rate, steps, order):
    spent = [sampled(steps, noise, rate)]
    assert renyi_epsilon(spent, DELTA, order) >= epsilon(spent, DELTA) * 0.999


@settings(max_examples=8, deadline=None)
@given(noises, rates, steps_, st.floats(1e-8, 1e-3))
def test_the_best_order_is_the_best(noise, rate, steps, delta):
    spent = [sampled(steps, noise, rate)]
    found = renyi_epsilon(spent, delta, best_order(spent, delta))
    assert found <= min(renyi_epsilon(spent, delta, order) for order in range(2, 200))


def test_the_room_under_a_ceiling_is_where_the_ceiling_is_met():
    noise = 3.0
    per_step = renyi([sampled(1, noise, 0.2)], 6)
    steps = math.floor(renyi_room(4.0, DELTA, 6) / per_step)
    assert renyi_epsilon([sampled(steps, noise, 0.2)], DELTA, 6) <= 4.0
    assert renyi_epsilon([sampled(steps + 1, noise, 0.2)], DELTA, 6) > 4.0


@pytest.mark.parametrize("ceiling", [1.0, 8.0])
def test_the_order_of_an_open_ceiling_leaves_typical_plans_most_of_it(ceiling):
    order = roomy_order(ceiling, DELTA)
    for rate, steps in ((0.2, 400), (0.1, 1000)):
        noise = calibrate(lambda z, s=steps, q=rate: [sampled(s, z, q)], ceiling, DELTA)
        spent = [sampled(steps, noise, rate)]
        assert renyi_epsilon(spent, DELTA, order) < 1.35 * renyi_epsilon(spent, DELTA, best_order(spent, DELTA))


# --- sums


def test_equal_events_are_one_and_nothing_is_lost():
    spent = [sampled(3, 1.0, 0.1), sampled(0, 2.0, 0.1), sampled(4, 1.0, 0.1), PrivacyEvent(mechanism="none", steps=0)]
    assert merged(spent) == (sampled(7, 1.0, 0.1), PrivacyEvent(mechanism="none", steps=0))


def test_parts_cost_what_the_whole_costs():
    whole = [
        sampled(90, 2.0, 0.2),
        sampled(30, 3.0, 0.2),
        PrivacyEvent(mechanism="scores", steps=1, noise_multiplier=20.0),
    ]
    parts = [sampled(30, 2.0, 0.2), sampled(10, 3.0, 0.2)] * 3 + whole[2:]
    assert epsilon(parts, DELTA) == epsilon(whole, DELTA) > epsilon(whole[:2], DELTA)
    assert renyi(parts, 5) == pytest.approx(sum(renyi([event], 5) for event in whole), rel=1e-12)


def test_nothing_costs_nothing():
    for spent in ([], [sampled(0, 1.0, 0.2)]):
        assert epsilon(spent, DELTA) == renyi(spent, 4) == renyi_epsilon(spent, DELTA, 4) == 0


def test_one_release_without_noise_and_no_figure_is_true():
    for steps in (0, 1):
        spent = [sampled(10, 5.0, 0.1), PrivacyEvent(mechanism="none", steps=steps)]
        assert epsilon(spent, DELTA) == renyi(spent, 4) == renyi_epsilon(spent, DELTA, 4) == math.inf


def test_figures_stay_quick_and_finite_with_next_to_no_noise():
    """The number of grid points is bounded, or this would take 100 GB."""
    assert 1e4 < epsilon([sampled(1000, 0.03, 0.2)], DELTA) < 1e7


def test_default_delta_is_small_against_one_patient():
    assert default_delta(50) == 1e-5
    assert default_delta(100_000) == 1e-6


# --- calibration


@pytest.mark.parametrize("target", [0.2, 1.0, 8.0])
@pytest.mark.parametrize(
    "plan",
    [
        lambda z: [sampled(200, z, 0.2)],
        lambda z: [PrivacyEvent(mechanism="feddp", steps=20, noise_multiplier=z / 2, unit="site")],
        lambda z: [
            sampled(50, z, 0.3),
            sampled(50, 2 * z, 0.3),
            PrivacyEvent(mechanism="x", steps=1, noise_multiplier=90.0),
        ],
    ],
    ids=["dp-sgd", "feddp", "schedule"],
)
def test_calibrated_noise_holds_and_is_no_larger_than_it_must_be(plan, target):
    noise = calibrate(plan, target, DELTA)
    assert epsilon(plan(noise), DELTA) <= target < epsilon(plan(noise * 0.999), DELTA)
    assert noise == round(noise, 4)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (lambda z: [sampled(200, 0.5, 0.2)], "no noise keeps"),
        (lambda z: [PrivacyEvent(mechanism="none", steps=1)], "no noise keeps"),
        (lambda z: [], "next to no noise"),
    ],
)
def test_what_no_noise_mends_is_said(plan, said):
    with pytest.raises(ValidationErrors, match=said):
        calibrate(plan, 1.0, DELTA)


# --- mistakes found in public code


def test_rounds_are_not_steps():
    """Mistake 6: ten rounds of twenty steps cost what two hundred steps cost."""
    assert epsilon([sampled(20, 2.0, 0.2)] * 10, DELTA) == epsilon([sampled(200, 2.0, 0.2)], DELTA)
    assert epsilon([sampled(200, 2.0, 0.2)], DELTA) > 2 * epsilon([sampled(10, 2.0, 0.2)], DELTA)


def test_only_a_coin_for_each_patient_is_billed_as_sampling():
    """Mistake 5: an event that says nothing of sampling is billed for everybody taking part in every step."""
    plain = PrivacyEvent(mechanism="shuffled", steps=100, noise_multiplier=4.0)
    assert epsilon([plain], DELTA) > 3 * epsilon([sampled(100, 4.0, 0.1)], DELTA)


def test_any_two_data_sets_cost_as_said():
    """Mistake 13: R 50, std 5 C. A multiplier of 5 says 6.6, of 5 / 2 (the update moves by 2 C) 15.5."""
    honest = PrivacyEvent(mechanism="feddp", steps=50, noise_multiplier=2.5, unit="site")
    assert epsilon([honest], DELTA) == pytest.approx(15.5, abs=0.1)
    assert epsilon([honest.model_copy(update={"noise_multiplier": 5.0})], DELTA) == pytest.approx(6.6, abs=0.1)


@pytest.mark.parametrize("epsilon, word", [(0.1, "strong"), (1.0, "strong"), (3.0, "moderate"), (8.0, "weak")])
def test_protection_in_a_word(epsilon, word):
    assert protection(epsilon) == word


def test_the_words_of_protection_are_of_the_rates_that_are_stated():
    assert success_rate(1.0, 0.0) < 0.732 and success_rate(3.0, 0.0) < 0.953

"""What events cost together: epsilon for reports (privacy loss distributions), and Renyi divergence for the ledger.

Neighbours are data sets in which one patient's records are replaced by nothing that counts (REPLACE_SPECIAL of
dp-accounting, whose figures are those of add or remove); an event of the unit "site" bounds any two data sets, so it
bounds these too, and all are composed alike. Everything here is an upper bound.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from typing import Any, Literal

from autofed.errors import ValidationErrors
from autofed.privacy.events import PrivacyEvent

LARGEST_ORDER = 1024
"""Orders are looked for up to here; a larger one is best only for an epsilon below 0.02 or so."""

_GRID_SHARE = 0.02
"""The grid of privacy losses is this share of a step's typical loss: finer changes no third digit of epsilon."""

_COARSEST_GRID, _MOST_POINTS = 1e-3, 1_000_000


def merged(events: Iterable[PrivacyEvent]) -> tuple[PrivacyEvent, ...]:
    """The same events with the steps of equal ones added up; those that cost nothing are left out."""
    steps: Counter[PrivacyEvent] = Counter()
    for event in events:
        steps[event.model_copy(update={"steps": 0})] += event.steps
    return tuple(
        event.model_copy(update={"steps": total})
        for event, total in steps.items()
        if total or event.noise_multiplier is None
    )


def dp_event(events: Iterable[PrivacyEvent]) -> Any:
    """The events as one `DpEvent` of dp-accounting."""
    import dp_accounting

    parts = [_dp_event(event) for event in merged(events)]
    return dp_accounting.ComposedDpEvent(parts) if parts else dp_accounting.NoOpDpEvent()


def _dp_event(event: PrivacyEvent) -> Any:
    import dp_accounting

    if event.noise_multiplier is None:
        return dp_accounting.NonPrivateDpEvent()
    step = dp_accounting.GaussianDpEvent(event.noise_multiplier)
    if event.sampling_rate < 1:
        step = dp_accounting.PoissonSampledDpEvent(event.sampling_rate, step)
    return dp_accounting.SelfComposedDpEvent(step, event.steps)


# --- epsilon, for plans and reports


def epsilon(events: Iterable[PrivacyEvent], delta: float) -> float:
    """The epsilon of all events together at `delta`: 0 for none, infinite if any of them has no noise.

    By privacy loss distributions, on a grid that follows the size of the losses (a fixed one of 1e-3 overstates plans
    with a low sampling rate by half); by the closed form where nothing is sampled. It holds for events that were fixed
    beforehand. Where they follow from what was released, the filter of the ledger holds, at its own figure.
    """
    spent = _protected(events)
    return math.inf if spent is None else _composed_epsilon(spent, delta)


@lru_cache(maxsize=1000)
def _composed_epsilon(events: tuple[PrivacyEvent, ...], delta: float) -> float:
    sampled = [event for event in events if event.sampling_rate < 1]
    whole = sum(event.steps / _noise(event) ** 2 for event in events if event.sampling_rate == 1)
    if not sampled:
        return _gaussian_epsilon(whole, delta)
    if whole:  # Gaussians compose to one
        sampled.append(PrivacyEvent(mechanism="", steps=1, noise_multiplier=whole**-0.5))
    return _sampled_epsilon(tuple(sampled), delta)


def _gaussian_epsilon(inverse_square: float, delta: float) -> float:
    """Balle and Wang 2018, equation 6, for a noise multiplier of `inverse_square` ** -0.5."""
    import dp_accounting

    return dp_accounting.get_epsilon_gaussian(inverse_square**-0.5, delta) if inverse_square else 0.0


@lru_cache(maxsize=256)  # a site asks for that of its plan with every request
def _sampled_epsilon(events: tuple[PrivacyEvent, ...], delta: float) -> float:
    from dp_accounting import NeighboringRelation, pld

    accountant = pld.PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, _grid(events))
    accountant.compose(dp_event(events))
    return float(accountant.get_epsilon(delta))


def _grid(events: Sequence[PrivacyEvent]) -> float:
    """The interval of the grid: a share of the root mean square of a step's loss, and never too many points."""
    steps = sum(event.steps for event in events)
    square = _square_loss(events)
    means = [event.sampling_rate / (2 * _noise(event) ** 2) * event.steps for event in events]
    single = max(1 / (2 * _noise(event) ** 2) + 10 / _noise(event) for event in events)
    widest = sum(means) + 10 * math.sqrt(square) + single
    return max(min(_COARSEST_GRID, _GRID_SHARE * math.sqrt(square / steps)), widest / _MOST_POINTS)


def _square_loss(events: Iterable[PrivacyEvent]) -> float:
    """The variance of the privacy loss of all events, roughly."""
    return math.fsum(event.steps * _square_step_loss(_noise(event), event.sampling_rate) for event in events)


def _square_step_loss(noise: float, rate: float) -> float:
    whole = noise**-2
    return whole if rate == 1 else min(rate**2 * math.expm1(min(whole, 50)), whole)


def calibrate(
    make_events: Callable[[float], Sequence[PrivacyEvent]],
    epsilon: float,
    delta: float,
    measure: Callable[[Sequence[PrivacyEvent], float], float] | None = None,
) -> float:
    """The smallest noise multiplier whose events cost at most `epsilon` at `delta`: at least 4 digits, rounded up.

    `make_events` gives the events of a plan with that multiplier; more noise must cost less. `measure` computes what
    they cost, by default as `epsilon` does. `ValidationErrors` if no noise brings them below `epsilon`, or if they cost
    next to nothing whatever the noise.
    """

    @cache
    def cost(noise: float) -> float:
        return (measure or _epsilon)(make_events(noise), delta)

    guess = _guess(make_events, epsilon, delta)
    if 0 < cost(guess) < math.inf:  # as far off as here it will be nearby
        guess = _guess(make_events, epsilon * _rough_epsilon(make_events(guess), delta) / cost(guess), delta)
    return _smallest(cost, epsilon, *_bracket(cost, epsilon, guess))


_epsilon = epsilon  # `calibrate` has a parameter of that name


def approximate_noise(
    steps: int, rate: float, epsilon: float, delta: float, fingerprint_noise: float | None = None
) -> float:
    """About the noise multiplier with which `steps` steps at a sampling rate cost `epsilon` at `delta`, for searches.

    In closed form, from a central limit theorem (Bu, Dong, Long and Su 2020): within a few percent of `calibrate`.
    Private fingerprints with noise of the multiplier `fingerprint_noise` are paid first; infinite if nothing is left.
    """
    whole = _largest_inverse_square(epsilon, delta) - (float(fingerprint_noise**-2) if fingerprint_noise else 0)
    if whole <= 0:
        return math.inf
    return math.sqrt(steps / whole) if rate == 1 else math.log1p(whole / (steps * rate**2)) ** -0.5


@lru_cache(maxsize=256)  # a search needs that of its guarantee with every candidate
def _largest_inverse_square(epsilon: float, delta: float) -> float:
    """The largest sum of z^-2 over Gaussian mechanisms of multipliers z within `epsilon` (Balle and Wang 2018)."""
    import dp_accounting

    return float(dp_accounting.get_sigma_gaussian(epsilon, delta) ** -2)


_LEAST_NOISE, _MOST_NOISE = 2.0**-10, 2.0**20


def _guess(make_events: Callable[[float], Sequence[PrivacyEvent]], epsilon: float, delta: float) -> float:
    """About the noise multiplier for an epsilon."""
    low, high = _LEAST_NOISE, _MOST_NOISE
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _rough_epsilon(make_events(middle), delta) > epsilon else (low, middle)
    return high


def _rough_epsilon(events: Sequence[PrivacyEvent], delta: float) -> float:
    """What it would be if every loss were normal (a central limit theorem; Bu, Dong, Long and Su 2020)."""
    spent = _protected(events)
    return math.inf if spent is None else _gaussian_epsilon(_square_loss(spent), delta)


def _bracket(cost: Callable[[float], float], most: float, guess: float) -> tuple[float, float]:
    """A multiplier that costs too much and one that does not, on either side of the guess."""
    low = high = guess
    step = 1.005
    while cost(high) > most:
        low, high, step = high, high * step, step**2
        if high > 2 * _MOST_NOISE:
            raise ValidationErrors(
                "privacy",
                [f"no noise keeps these releases within epsilon {most:g}; fewer steps or rounds, or a larger epsilon"],
            )
    while cost(low) <= most:
        low, high, step = low / step, low, step**2
        if low < _LEAST_NOISE / 2:
            raise ValidationErrors(
                "privacy",
                [
                    f"next to no noise is needed for epsilon {most:g}: nothing is released, or far "
                    "more is allowed than is spent; set the noise multiplier by hand"
                ],
            )
    return low, high


def _smallest(cost: Callable[[float], float], most: float, low: float, high: float) -> float:
    from scipy.optimize import brentq

    digits = max(4, 3 - math.floor(math.log10(low)))
    unit = 10.0**-digits
    root: float = brentq(lambda noise: math.log(max(cost(noise), 1e-12) / most), low, high, xtol=unit / 4)
    noise = round(math.ceil(root / unit) * unit, digits)
    while cost(noise) > most:  # the grid of the accountant leaves small steps in the curve
        noise = round(noise + unit, digits)
    return noise


def default_delta(patients: int) -> float:
    """The delta of a plan whose largest site has so many patients: small against one in so many."""
    return min(1e-5, 1 / (10 * patients))


def success_rate(epsilon: float, delta: float) -> float:
    """How often at best someone is right about a patient who was used or not, evenly: guessing gives 0.5.

    What holds for every test: its hits are at most e^epsilon times its false alarms plus delta, and the other way round
    (Kairouz, Oh and Viswanath 2015, theorem 2.1).
    """
    return (1 + delta * math.exp(-epsilon)) / (1 + math.exp(-epsilon))


def protection(epsilon: float) -> Literal["strong", "moderate", "weak"]:
    """How much a guarantee protects, in a word, by the best `success_rate`: up to 73.2 %, up to 95.3 %, or more."""
    return "strong" if epsilon <= 1 else "moderate" if epsilon <= 3 else "weak"


def percent_at_most(rate: float) -> str:
    """A rate below 1 as percent, rounded up, with as many digits as it takes to stay below 100."""
    for digits in range(2, 12):
        value = math.ceil(rate * 100 * 10**digits - 1e-9) / 10**digits
        if value < 100:
            return f"{value:.{digits}f}"
    return "100"


def rounded_up(epsilon: float) -> str:
    """An epsilon to two digits after the point, never too small."""
    return f"{math.ceil(epsilon * 100) / 100:.2f}"


# --- Renyi divergence, for the filter


def renyi(events: Iterable[PrivacyEvent], order: int) -> float:
    """The Renyi divergence of integer `order` (2 or more) of all events together: a plain sum, infinite if unprotected.

    That a sum of it may be held against a ceiling while the events are still being chosen, by what earlier ones
    released, is theorem 4.3 of Feldman and Zrnic 2021.
    """
    spent = _protected(events)
    if spent is None:
        return math.inf
    return math.fsum(event.steps * _step_divergence(_noise(event), event.sampling_rate, order) for event in spent)


def renyi_epsilon(events: Iterable[PrivacyEvent], delta: float, order: int) -> float:
    """The epsilon at `delta` that the Renyi divergence of one `order` proves; 0 for no events.

    Canonne, Kamath and Steinke 2020, proposition 12.
    """
    divergence = renyi(events, order)
    return max(0.0, divergence - renyi_room(0.0, delta, order)) if divergence else 0.0


def renyi_room(epsilon: float, delta: float, order: int) -> float:
    """The divergence of `order` that proves `epsilon` at `delta`: what a ceiling allows; below 0 if none proves it."""
    return epsilon - math.log1p(-1 / order) + math.log(delta * order) / (order - 1)


def best_order(events: Iterable[PrivacyEvent], delta: float) -> int:
    """The integer order whose divergence proves the smallest epsilon."""
    spent = merged(events)
    return _best(lambda order: -renyi_epsilon(spent, delta, order))


def roomy_order(epsilon: float, delta: float) -> int:
    """The order for a ceiling before any plan is known: the one that suits sampled Gaussians of typical plans best.

    Each of `_TYPICAL` plans (sampling rate, steps) gets the noise that just meets the ceiling at the order that is best
    for it. At another order fewer of its steps fit; the order chosen is the one at which the worst off of these plans
    keeps the largest share of its steps.
    """
    shares = [_share_by_order(rate, steps, epsilon, delta) for rate, steps in _TYPICAL]
    return _best(lambda order: min(share(order) for share in shares))


_TYPICAL = ((0.05, 2000), (0.2, 200), (0.2, 1000), (0.5, 300), (1.0, 50))


def _share_by_order(rate: float, steps: int, epsilon: float, delta: float) -> Callable[[int], float]:
    """For a typical plan: order -> the share of its steps that fit under the ceiling at this order."""
    low, high = 0.05, 1000.0
    for _ in range(20):
        middle = math.sqrt(low * high)
        event = PrivacyEvent(mechanism="", steps=steps, noise_multiplier=middle, sampling_rate=rate)
        if renyi_epsilon([event], delta, best_order([event], delta)) > epsilon:
            low = middle
        else:
            high = middle
    return lambda order: renyi_room(epsilon, delta, order) / (steps * _step_divergence(high, rate, order))


def _best(value: Callable[[int], float]) -> int:
    """The order of the largest value: a coarse look first, then every order about the best."""
    coarse = [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, LARGEST_ORDER]
    at = max(range(len(coarse)), key=lambda i: value(coarse[i]))
    return max(range(coarse[max(at - 1, 0)], coarse[min(at + 1, len(coarse) - 1)] + 1), key=value)


@lru_cache(maxsize=100_000)
def _step_divergence(noise: float, rate: float, order: int) -> float:
    """Of one step of a Poisson-sampled Gaussian: Mironov, Talwar and Zhang 2019, section 3.3, at an integer order.

    Their sum is 1 and the terms below, all of them positive, so that nothing is lost where it is next to 1.
    """
    import numpy as np
    from scipy.special import gammaln, logsumexp

    if rate == 1:
        return order / (2 * noise**2)
    k = np.arange(2, order + 1)
    chosen = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    exponent = (k * k - k) / (2 * noise**2)
    excess = exponent + np.log(-np.expm1(-exponent))
    terms = chosen + k * math.log(rate) + (order - k) * math.log1p(-rate) + excess
    return float(np.logaddexp(0, logsumexp(terms))) / (order - 1)


def _protected(events: Iterable[PrivacyEvent]) -> tuple[PrivacyEvent, ...] | None:
    """What was spent, or None if anything left unprotected."""
    spent = merged(events)
    return None if any(event.noise_multiplier is None for event in spent) else spent


def _noise(event: PrivacyEvent) -> float:
    assert event.noise_multiplier is not None
    return event.noise_multiplier

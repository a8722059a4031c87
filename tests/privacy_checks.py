"""What an honest mechanism keeps, measured from outside: how far one patient moves what it releases, and its noise.

Nothing here reads a mechanism's fields: each check runs it through its protocol with secrets of its own. The same
secret gives the same draws and noise, so that noise falls out of a difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice, pairwise

import numpy as np
import torch

from autofed.privacy import ADAPTATION

PATIENTS = 10
NAMES = [f"p{i}" for i in range(PATIENTS)]
WIDTH = 64

Case = Mapping[str, list]
"""The gradient of every patient who is drawn."""


def secret(number: int) -> bytes:
    return number.to_bytes(32, "big")


def cases(seed: int = 0, count: int = 40) -> list[Case]:
    """What patients' gradients may be: random ones of all lengths, all against one, none at all, and not numbers."""
    generator = np.random.default_rng(seed)
    against = {name: [torch.full((WIDTH,), -9.0)] for name in NAMES[1:6]}
    found: list[Case] = [
        {NAMES[0]: [torch.full((WIDTH,), 9.0)], **against},
        {NAMES[0]: [torch.zeros(WIDTH)], **against},
        {NAMES[0]: [torch.full((WIDTH,), 1e30)], **against},
        {NAMES[0]: [torch.full((WIDTH,), torch.nan)], **against},
        {NAMES[0]: [torch.full((WIDTH,), torch.inf)], **against},
        {NAMES[0]: [torch.full((WIDTH,), 1e-3)]},
    ]
    for _ in range(count):
        drawn = [NAMES[0], *generator.choice(NAMES[1:], generator.integers(0, 6), replace=False)]
        found.append({name: _gradient(generator) for name in drawn})
    return found


def _gradient(generator: np.random.Generator) -> list:
    numbers = generator.normal(size=WIDTH) * 10.0 ** generator.uniform(-3, 3)
    return [torch.from_numpy(numbers.astype(np.float32))]


def step_of(mechanism, gradients: Case, key: bytes) -> dict[str, np.ndarray]:
    """What one step and the release after it give: the `step`, and every other group that leaves."""
    with_key = mechanism.with_key(key)
    step = torch.cat([part.flatten() for part in with_key.step(iter(gradients.values()), [torch.zeros(WIDTH)])])
    released = with_key.release({"update": {"w": -step.numpy()}})
    others = {group: np.concatenate([a.ravel() for a in arrays.values()]) for group, arrays in released.items()}
    others.pop("update", None)
    return {"step": step.numpy().astype(np.float64), **others}


def moved(mechanism, gradients: Case, who: str, rate: float) -> dict[str, float]:
    """How far zeroing one patient moves each thing that leaves, as a sum over patients (times the expected number)."""
    without = {name: gradient for name, gradient in gradients.items() if name != who}
    one, other = (step_of(mechanism, world, secret(1)) for world in (gradients, without))
    return {name: float(np.linalg.norm(one[name] - other[name])) * rate * PATIENTS for name in one}


def spread(mechanism, rate: float, releases: int = 200) -> dict[str, float]:
    """The standard deviation of what leaves when nobody is drawn, over many secrets, in the same unit."""
    rows = [step_of(mechanism, {}, secret(number)) for number in range(releases)]
    return {name: float(np.std([row[name] for row in rows])) * rate * PATIENTS for name in rows[0]}


def step_multiplier(mechanism) -> float:
    """Noise over sensitivity of all that one step releases, as one Gaussian vector: what a ledger may be told."""
    rate = mechanism.cost(1)[0].sampling_rate
    noise = spread(mechanism, rate)
    far = [moved(mechanism, gradients, NAMES[0], rate) for gradients in cases()]
    return _joint([{name: moves[name] for name in noise} for moves in far], noise)


def release_multiplier(mechanism, releases: int = 400) -> float:
    """The same for a mechanism of whole updates, between any two data sets of a site."""
    generator = np.random.default_rng(0)
    lengths = 10.0 ** generator.uniform(-3, 3, 20)
    updates = [length * generator.normal(size=WIDTH) for length in lengths]
    pairs = [(updates[i], -updates[i]) for i in range(20)] + list(pairwise(updates))
    noise = np.std([_released(mechanism, np.zeros(WIDTH), secret(i)) for i in range(releases)])
    far = [np.linalg.norm(_released(mechanism, a, secret(1)) - _released(mechanism, b, secret(1))) for a, b in pairs]
    return _joint([{"update": float(length)} for length in far], {"update": float(noise)})


def _released(mechanism, update: np.ndarray, key: bytes) -> np.ndarray:
    arrays = {"update": {"w": update.astype(np.float32)}}
    return mechanism.with_key(key).release(arrays)["update"]["w"].astype(np.float64)


def _joint(far: Sequence[Mapping[str, float]], noise: Mapping[str, float]) -> float:
    worst = 0.0
    for moves in far:
        parts = [moves[name] / noise[name] if noise[name] > 0 else math.inf for name in moves if moves[name] > 0]
        worst = max(worst, sum(part**2 for part in parts)) if not any(map(math.isnan, parts)) else math.inf
    return worst**-0.5 if worst else math.inf


def overstated(mechanism, measure: Callable = step_multiplier) -> bool:
    """Whether the events of `cost` tell of more noise than is there; 5 % are left to chance."""
    (event,) = mechanism.cost(1)
    return not measure(mechanism) >= 0.95 * event.noise_multiplier


def drawn(mechanism, steps: int = 2000) -> np.ndarray:
    """Who was drawn: bool (steps, patients)."""
    sampler = mechanism.with_key(secret(5)).sampler(NAMES, [0])
    return np.array(
        [[name in {n for group in draw for n in group} for name in NAMES] for draw in islice(sampler, steps)]
    )


def is_poisson(mechanism) -> bool:
    """Whether every patient has a coin of their own in every step, at the rate that is billed.

    Measured: the share of steps, the variance of the number drawn, and of a patient's part in blocks of steps.
    """
    rate, found = mechanism.cost(1)[0].sampling_rate, drawn(mechanism)
    spread_of_draws = PATIENTS * rate * (1 - rate)
    blocks = found.reshape(-1, round(1 / rate), PATIENTS).sum(1)
    expected = round(1 / rate) * rate * (1 - rate)
    return (
        abs(found.mean() - rate) < 0.02
        and abs(found.sum(1).var() / spread_of_draws - 1) < 0.2
        and abs(blocks.var(0).mean() / expected - 1) < 0.2
    )


def is_gaussian(mechanism) -> bool:
    """Whether the noise is what a Gaussian mechanism is billed for."""
    from scipy.stats import kstest

    noise = np.concatenate([step_of(mechanism, {}, secret(number))["step"] for number in range(100)])
    return kstest(noise / noise.std(), "norm").pvalue > 1e-4


def is_foreseeable(mechanism) -> bool:
    """Whether who knows the seeds of a training knows its noise: two secrets, one state of the global generators."""

    def noise(number: int) -> np.ndarray:
        np.random.seed(7)
        torch.manual_seed(7)
        return step_of(mechanism, {}, secret(number))["step"]

    return bool(np.array_equal(noise(1), noise(2)))


def is_finite(mechanism) -> bool:
    """Whether patients without any gradient, and ones that are not numbers, leave a step of numbers."""
    return all(np.isfinite(step_of(mechanism, gradients, secret(3))["step"]).all() for gradients in cases(count=0))


def clip_after(mechanism, norm: float, rounds: int = 60) -> float:
    """The longest step of one patient after so many rounds in which all gradients have about that length."""
    generator = np.random.default_rng(3)
    for number in range(rounds):
        with_key = mechanism.with_key(secret(number))
        for _ in range(3):
            lengths = norm * generator.lognormal(0, 0.1, PATIENTS)
            with_key.step([[torch.eye(WIDTH)[i] * length] for i, length in enumerate(lengths)], [torch.zeros(WIDTH)])
        mechanism = mechanism.adapt(with_key.release({})[ADAPTATION])
    rate = mechanism.cost(1)[0].sampling_rate
    return moved(mechanism, {NAMES[0]: [torch.full((WIDTH,), 1e6)]}, NAMES[0], rate)["step"]


def patient_multiplier(mechanism, steps: int = 50) -> float:
    """Noise over what one patient moves a step in all the groups that the sampler draws for them."""
    rate = mechanism.cost(1)[0].sampling_rate
    noise, who, worst = spread(mechanism, rate)["step"], NAMES[0], 0.0
    for draw in islice(mechanism.with_key(secret(2)).sampler(NAMES, [0]), steps):
        groups = [(group[0], [torch.ones(WIDTH) * (1 if group[0] == who else -1)]) for group in draw]
        worlds = [groups, [group for group in groups if group[0] != who]]
        one, other = (_sum(mechanism, [gradient for _, gradient in world]) for world in worlds)
        worst = max(worst, float(torch.linalg.vector_norm(one - other)) * rate * PATIENTS)
    return noise / worst if worst else math.inf


def _sum(mechanism, gradients: Sequence[list]) -> torch.Tensor:
    return mechanism.with_key(secret(1)).step(iter(gradients), [torch.zeros(WIDTH)])[0]

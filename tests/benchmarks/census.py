"""How near plans of noised fingerprints come to the open ones: configuration, patch, spacing, normalisation.

    python -m tests.benchmarks.census [--draws 20] [--cost]

Cohorts are drawn from the gallery's histograms and from made-up scanners (`tests/cohorts.py`), anew for every draw of
the noise. A line tells in how many draws each of these held:
  same      the same configuration (2d, 3d_fullres)
  patch     every edge of the patch off by at most one of the multiples that pooling asks for
  halved    every edge, and how often it is halved, off by a factor of 2 at most
  spacing   every axis within a quarter of the open plan's (median error beside it)
  intensity the same schemes; of CT mean, deviation, and normalised foreground (RMS) off by at most 0.1 deviations
With --cost: how much more noise a training needs with a census before it than with none, for one promise.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np

from autofed.plans import Plan
from autofed.privacy import accounting
from autofed.privacy.events import PrivacyEvent
from autofed.privacy.private_fingerprint import PrivateFingerprintMechanism, noise_for, order_of
from tests import cohorts

SETTINGS = ((3, 100, 8.0), (1, 100, 8.0), (3, 100, 3.0), (3, 300, 3.0), (3, 30, 8.0))
FIRST = 1000
"""The seed of the first draw: bins, weights and circles were chosen by looking at lower ones."""

COLUMNS = ("task", "sites x patients", "epsilon", "same", "patch", "halved", "spacing (error)", "intensity (error)",
           "from a default")  # fmt: skip


def main() -> None:
    """Print the table, a line at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--task", action="append")
    parser.add_argument("--cost", action="store_true", help="print only what a census costs the training")
    args = parser.parse_args()
    if args.cost:
        print(cost())
        return
    begun = time.perf_counter()
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    for task in args.task or (*cohorts.TASKS, *cohorts.SYNTHETIC):
        for sites, patients, epsilon in SETTINGS:
            print("| " + " | ".join(line(task, sites, patients, epsilon, args.draws)) + " |", flush=True)
    print(f"\n{args.draws} draws, {time.perf_counter() - begun:.0f} s")


TRAININGS = ((0.05, 200), (0.05, 1000), (0.1, 2000), (0.2, 300), (0.02, 4000), (1.0, 50))
"""Sampling rate and steps."""


def cost() -> str:
    """A row for every training: its noise multiplier with a census over that without one, by epsilon."""
    lines = ["| q, steps | epsilon 8 | epsilon 3 |", "|---|---|---|"]
    for rate, steps in TRAININGS:
        more = " | ".join(f"{raised(rate, steps, epsilon):.3f}" for epsilon in (8.0, 3.0))
        lines.append(f"| {rate:g}, {steps} | {more} |")
    return "\n".join(lines)


def raised(rate: float, steps: int, epsilon: float) -> float:
    """By loss distributions without a census; with one by the filter that its noise fixes, as plans are."""
    noise = noise_for(epsilon, 1e-5)
    census, order = PrivateFingerprintMechanism(noise).cost(), order_of(noise)

    def events(z: float) -> list[PrivacyEvent]:
        return [PrivacyEvent(mechanism="", steps=steps, noise_multiplier=z, sampling_rate=rate)]

    def measure(found: Sequence[PrivacyEvent], delta: float) -> float:
        return accounting.renyi_epsilon(found, delta, order)

    alone = accounting.calibrate(events, epsilon, 1e-5)
    return accounting.calibrate(lambda z: [*events(z), *census], epsilon, 1e-5, measure) / alone


def line(task: str, sites: int, patients: int, epsilon: float, draws: int) -> list[str]:
    """One row of the table."""
    found = np.array([compare(task, sites, patients, epsilon, FIRST + draw) for draw in range(draws)])
    same, patch, halved, spacing, intensity, taken = found.T
    held = [int(np.sum(part)) for part in (same, patch <= 1, halved <= 1, spacing <= 0.25, intensity <= 0.1)]
    errors = [f"{held[3]} ({np.median(spacing):.2f})", f"{held[4]} ({np.median(intensity):.2f})"]
    return [task, f"{sites} x {patients}", f"{epsilon:g}", *map(str, held[:3]), *errors, f"{np.mean(taken):.1f} fields"]


def compare(task: str, sites: int, patients: int, epsilon: float, seed: int) -> tuple[float, ...]:
    """How far one draw is off."""
    rng = np.random.default_rng([seed, sites, patients])
    fed = cohorts.federation(task, sites, patients, rng)
    made, private = cohorts.open_plan(fed), cohorts.private_plan(fed, noise_for(epsilon, 1e-5), rng)
    return (
        float(cohorts.same_dimensionality(made, private)),
        cohorts.patch_error(made, private),
        cohorts.poolings_error(made, private),
        _spacing_error(made, private),
        cohorts.intensity_error(made, private, fed),
        sum("taken from" in reason.why for reason in private.reasons),
    )


def _spacing_error(made: Plan, private: Plan) -> float:
    here, there = made.local.geometry, private.local.geometry
    sides = zip(_by_axis(here), _by_axis(there), strict=True)
    return max(abs(a - b) / a for a, b in sides)


def _by_axis(geometry) -> list[float]:
    return [geometry.spacing_mm[geometry.transpose.index(axis)] for axis in range(3)]


if __name__ == "__main__":
    main()

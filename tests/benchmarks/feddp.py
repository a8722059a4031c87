"""FedDP on histology: what its noise costs, what it promises, and what an attack still sees.

    OMP_NUM_THREADS=1 python tests/benchmarks/feddp.py DATA -o OUT

Every site's update of a round is cut to the length C and gets noise of z C in every weight. C is the median length of
all updates of an open training, as a federation would take it from public data. z = 0 is the open training itself, with
the same average over rounds. Runs, folders and held-out patients as in privacy.py.

The attack sees one released update of one step on one patch of one patient whose label map it knows, stretched to the
length C: the worst case for the patient. It succeeds as far as its reconstruction is more like the patch (SSIM) than a
blank one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from _federations import HELD_OUT, Experiment, Result, apart, bench, markdown, parser, points, test_set
from privacy import DELTA, Private, stamp

from autofed import plans
from autofed.auditing.inversion import gradient_of, invert_gradient, reconstruction_metrics
from autofed.data.labels import Labels
from autofed.federation import client
from autofed.federation.run_folder import GLOBAL, Run
from autofed.files import read_json, write_json
from autofed.inference.predictor import Predictor
from autofed.preprocessing import open_store
from autofed.privacy import accounting, guarantee
from autofed.privacy.feddp import FedDP
from autofed.training.batches import IDENTITY, sample_patch
from autofed.training.network import build, weights_of

FEDERATION = "histology"
NOISES = (0.0003, 0.001, 0.01, 0.1, 0.3, 1.0, 5.0)
"""Multipliers z."""

PAPER = {"Dice": 0.55, "Jaccard": 0.63, "accuracy": 0.42}
"""Points that the paper's noise cost (arXiv:2411.04509)."""

ATTACKED, ITERATIONS = 2, 150
"""So many patches are sought, with so many steps each."""


def main() -> None:
    """Run what is missing, then print the table."""
    args = parser(__doc__, [FEDERATION]).parse_args()
    work = WithLengths(**vars(bench(args)), rounds=1)
    failed = 0
    if not args.table:
        failed = work.perform([OPEN])
        failed += work.perform(noised(work.length))
        attack(work)
    print(table(work), flush=True)
    raise SystemExit(1 if failed else 0)


OPEN = Experiment(FEDERATION, label="feddp-0", settings={"training.ema": 0.8, "keep_momentum": True})


def noised(length: float) -> Iterator[Experiment]:
    """One run for each multiplier."""
    for noise in NOISES:
        chosen = {"privacy.mechanism": "feddp", "privacy.clip": length, "privacy.noise_multiplier": noise,
                  "privacy.delta": DELTA, "batch_dice": False, **OPEN.settings}  # fmt: skip
        yield Experiment(FEDERATION, label=f"feddp-{noise:g}", settings=chosen)


# --- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WithLengths(Private):
    """Runs that note how long the sites' updates were, and score pixels."""

    @property
    def length(self) -> float:
        """The median length of an update in the open run, with 3 digits."""
        found = read_json(self.folder(OPEN) / "lengths.json")
        return float(f"{np.median(found):.3g}")

    def _perform(self, experiment: Experiment, folder: Path) -> None:
        with lengths() as found:
            super()._perform(experiment, folder)
        write_json(folder / "lengths.json", found)

    def _score(self, experiment: Experiment, run: Run, made: plans.Plan) -> dict[str, Any]:
        found = super()._score(experiment, run, made)
        predictor = Predictor(run.members(GLOBAL, [HELD_OUT])[-1:], device="cpu", mirroring=False)
        test = test_set(self.data / FEDERATION / "test", made)
        steps = max(made.steps_at(site) for site in made.agreement.patients)
        events = guarantee.planned(made, steps)
        return {**found, "pixels": pixels(predictor, test), "epsilon": accounting.epsilon(events, DELTA)}


def pixels(predictor: Predictor, test: Any) -> dict[str, list[float]]:
    """Jaccard of the structures and share of right pixels, by test case."""
    found = {}
    for name in test.cases:
        case = test.read(name)
        there, said = case.label > 0, predictor.predict(case).labels > 0
        found[name] = [float((there & said).sum() / max(1, (there | said).sum())), float((there == said).mean())]
    return found


@contextmanager
def lengths() -> Iterator[list[float]]:
    """The lengths of all updates that are computed in this block, before anything is done to them."""
    found: list[float] = []
    fit = client.fit

    def measured(weights: Any, *args: Any, **kwargs: Any) -> Any:
        fitted = fit(weights, *args, **kwargs)
        found.append(math.sqrt(sum(float((part**2).sum()) for part in fitted.update(weights).values())))
        return fitted

    with patch.object(client, "fit", measured):
        yield found


# --- the attack ------------------------------------------------------------------------------------------------------


def attack(work: WithLengths) -> None:
    """Seek some patches in updates with every noise; what was sought already is not sought again."""
    made = work.prepare(FEDERATION).change({"batch_dice": False, "precision": "float32"})
    store = open_store(work.out / FEDERATION / "work", "alpha", made.local)
    for number in range(ATTACKED):
        for noise in (0.0, *NOISES):
            path = work.out / FEDERATION / "attack" / f"{number}_{noise:g}.json"
            if not path.is_file():
                write_json(path, sought(made, store, number, noise, work.length))


def sought(made: plans.Plan, store: Any, number: int, noise: float, length: float) -> dict[str, float]:
    """How like a patient's patch what was found in its released update is, and how like it a blank one."""
    generator = np.random.default_rng(number)
    patient, labels = sorted(store.patients)[number], Labels.of(made.agreement)
    image, label = sample_patch(store, patient, made.local.training, IDENTITY, generator)
    image, label = np.ascontiguousarray(image, np.float32), np.ascontiguousarray(label)
    weights = weights_of(build(made.local.network, seed=number))
    step = {name: -part for name, part in gradient_of(image, label, weights, made.local, labels).items()}
    size = math.sqrt(sum(float((part**2).sum()) for part in step.values()))
    update = {name: np.float32(length / size) * part for name, part in step.items()}
    if noise:
        update = dict(FedDP(length, noise, 1).with_key(bytes([number]) * 32).release({"update": update})["update"])
    found = invert_gradient(update, weights, label, made.local, labels=labels, iterations=ITERATIONS, seed=number)
    said, blank = reconstruction_metrics(found, image), reconstruction_metrics(np.zeros_like(image), image)
    return {"ssim": said.ssim, "psnr": said.psnr, "blank_ssim": blank.ssim, "blank_psnr": blank.psnr}


def attacked(work: WithLengths, noise: float) -> tuple[str, str]:
    """Mean likeness of what was found, and of a blank patch."""
    paths = sorted((work.out / FEDERATION / "attack").glob(f"*_{noise:g}.json"))
    found = [read_json(path) for path in paths]
    if not found:
        return "-", "-"
    mean = {name: np.mean([one[name] for one in found]) for name in found[0]}
    return (f"{mean['ssim']:.3f}, {mean['psnr']:.1f} dB", f"{mean['blank_ssim']:.3f}, {mean['blank_psnr']:.1f} dB")


# --- the table -------------------------------------------------------------------------------------------------------


def table(work: WithLengths) -> str:
    """A row for every noise."""
    first = work.result(OPEN)
    if first is None:
        return "Nothing is finished yet.\n"
    known = {0.0: first}
    for noise, run in zip(NOISES, noised(work.length), strict=True):
        if result := work.result(run):
            known[noise] = result
    head = ("z", "epsilon", "Dice", "Jaccard", "accuracy", "lost: Dice, Jaccard, accuracy, points",
            "Dice beside open (95 %)", "attack: SSIM, PSNR", "blank: SSIM, PSNR")  # fmt: skip
    rows = [row(work, noise, result, first) for noise, result in known.items()]
    said = ", ".join(f"{name} {value}" for name, value in PAPER.items())
    return "\n".join([
        f"### {FEDERATION}", "", f"C = {work.length:g}; delta {DELTA:g}; {stamp(list(known.values()))}", "",
        markdown(head, rows), f"The paper's loss in points: {said}.", "",
    ])  # fmt: skip


def row(work: WithLengths, noise: float, result: Result, first: Result) -> tuple[str, ...]:
    """One noise."""
    figures, best = means(result), means(first)
    lost = ", ".join(f"{100 * (b - f):.2f}" for f, b in zip(figures, best, strict=True))
    epsilon = result.content["epsilon"]
    return (
        f"{noise:g}" if noise else "0, no clip", "infinite" if math.isinf(epsilon) else f"{epsilon:.4g}",
        *(f"{figure:.4f}" for figure in figures), lost if noise else "",
        points(apart([result], [first])) if noise else "", *attacked(work, noise),
    )  # fmt: skip


def means(result: Result) -> tuple[float, float, float]:
    """Dice, Jaccard and share of right pixels, means over the test cases."""
    jaccard, right = np.mean(list(result.content["pixels"].values()), axis=0)
    return result.dice("test"), float(jaccard), float(right)


if __name__ == "__main__":
    main()

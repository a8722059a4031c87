"""What becomes of a promise where a site has 2 to 9 patients: trained with and without it, at epsilon 8.

    OMP_NUM_THREADS=1 python tests/benchmarks/few_patients.py DATA -o OUT

Narrow networks on coarse grids, the recipe of privacy.py's tuned arm, every second patient a step; runs, folders and
held-out patients as there. In sites with fewer than five patients nobody is held out. "blank" is the Dice of an
untrained network's guess that nothing is there, or all of it, whichever is better: what is below has learned nothing.
The CT intensities of kidney-ct-simulated are simulated.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from _federations import Experiment, apart, bench, markdown, parser, points, test_set, unet
from privacy import DELTA, DP_SGD, Private, stamp

from autofed import plans
from autofed.data.labels import Labels, mask

EPSILON = 8.0
RATE = 0.5
NETWORKS = {"kidney-ct-simulated": unet(3, (4, 8, 16, 32)), "histology": unet(2, (4, 8, 16, 32)),
            "brain-mri": unet(3, (4, 8, 16, 32))}  # fmt: skip
PRECISION = {"kidney-ct-simulated": {"precision": "float32"}}
"""Its coarsest grid is two voxels thick, where torch 2.13 on a CPU computes wrong gradients in bfloat16."""

LENGTH = {"training.rounds": 15, "steps_per_round": 20}


def main() -> None:
    """Run what is missing, then print the table."""
    args = parser(__doc__, NETWORKS).parse_args()
    work, federations = Private(**vars(bench(args))), args.federation or list(NETWORKS)
    failed = 0 if args.table else work.perform(run for name in federations for run in runs(name))
    print(table(work, federations), flush=True)
    raise SystemExit(1 if failed else 0)


def runs(federation: str) -> list[Experiment]:
    """Without and with a promise."""
    shared = {**NETWORKS[federation], **LENGTH, **PRECISION.get(federation, {})}
    private = {
        **shared,
        **DP_SGD,
        "learning_rate": 0.02,
        "privacy.sampling_rate": RATE,
        "privacy.epsilon": EPSILON,
        "privacy.delta": DELTA,
    }
    return [
        Experiment(federation, label="few-none", settings={**shared, "keep_momentum": True, "batch_size": 4}),
        Experiment(federation, label="few-private", settings=private),
    ]


def table(work: Private, federations: list[str]) -> str:
    """A row for every federation."""
    rows = list(_rows(work, federations))
    head = ("federation", "patients a site", "test cases", "noise multiplier", "noise beside a step's bound",
            "Dice, none", "Dice, epsilon 8", "lost, points (95 %)", "blank")  # fmt: skip
    every = [result for name in federations for run in runs(name) if (result := work.result(run))]
    return f"### Few patients\n\n{stamp(every)}\n\n{markdown(head, rows)}" if rows else "Nothing is finished yet.\n"


def _rows(work: Private, federations: list[str]) -> Iterator[tuple[str, ...]]:
    for federation in federations:
        none, private = (work.result(run) for run in runs(federation))
        if none is None or private is None:
            continue
        made = work.plan_of(runs(federation)[1])
        patients = sorted(made.agreement.patients.values())
        z = private.content["privacy"]["noise_multiplier"]
        length = z * np.sqrt(made.local.network.parameters) / (RATE * patients[-1])
        yield (
            federation, f"{patients[0]} to {patients[-1]}", str(len(none.cases("test", "global"))), f"{z:.3g}",
            f"{length:.0f} times", f"{none.dice('test'):.4f}", f"{private.dice('test'):.4f}",
            points(apart([private], [none])), f"{blank(work, federation, made):.4f}",
        )  # fmt: skip


def blank(work: Private, federation: str, made: plans.Plan) -> float:
    """Dice of the better of two guesses that need no network: no structure anywhere, or one everywhere."""
    test, found = test_set(work.data / federation / "test", made), []
    for name in test.cases:
        truth = test.read(name).label
        guesses = []
        for _, values in Labels.of(made.agreement).structures:
            there = mask(truth, values)
            guesses.append(2 * there.sum() / (there.sum() + there.size) if there.any() else np.nan)
        found.append(np.nanmean(guesses))
    return float(np.mean(found))


if __name__ == "__main__":
    main()

"""The trainings that the planner's rule for private plans was fitted to: breast-ultrasound and hippocampus.

    OMP_NUM_THREADS=1 python tests/benchmarks/private_rule.py DATA -o OUT

Runs, folders and scores as in privacy.py: several processes share the work, and `--table` prints what is known. The
noise multiplier is set by hand, so that noise over signal covers what plans of other federations have; Dice is that of
the patients whom each site holds out. dermoscopy, on which the rule is tested (private_plans.py), has no part in it.
"""

from __future__ import annotations

from typing import Any

from _federations import Experiment, bench, markdown, parser, unet
from privacy import DP_SGD, Private

from autofed.planner import forecast

SEEDS = {"breast-ultrasound": 1, "hippocampus": 1}
FLAT = {width: {**unet(2, (width, 2 * width, 4 * width, 8 * width)), "deep_supervision": False} for width in (2, 4, 8)}


def main() -> None:
    """Run what is missing, then print the table."""
    args = parser(__doc__, SEEDS).parse_args()
    work = Private(**vars(bench(args)), rounds=4)
    runs = [run for run in (*ultrasound(), *volumes()) if run.federation in (args.federation or SEEDS)]
    failed = 0 if args.table else work.perform(runs)
    print(table(work, runs))
    raise SystemExit(1 if failed else 0)


def ultrasound() -> list[Experiment]:
    """Learning rates at three noises, widths, patches, and lengths."""
    return [
        *(flat(f"z{z:g}-lr{rate:g}".replace("z0", "z"), noise=z, rate=rate)
          for z, rates in ((0.61, (0.02, 0.06, 0.2, 0.6)), (1.8, (0.02, 0.06, 0.2)), (0.2, (0.06, 0.2, 0.6)))
          for rate in rates),
        flat("w2-lr.2", width=2, rate=0.2), flat("w8-lr.2", width=8, rate=0.2), flat("w8-lr.06", width=8),
        flat("K1-lr.06", patches=1), flat("K6-lr.06", patches=6), flat("K6-lr.2", patches=6, rate=0.2),
        flat("T130-lr.2", steps=130, noise=0.35, rate=0.2), flat("T1200-lr.06", steps=1200, noise=1.06),
    ]  # fmt: skip


def volumes() -> list[Experiment]:
    """With four stages and with three."""
    return [
        volume("s4-z.25", (4, 8, 16, 32), 0.25),
        volume("s3-z.35", (4, 8, 16), 0.35),
    ]


def flat(
    name: str, *, noise: float = 0.61, rate: float = 0.06, steps: int = 400, width: int = 4, patches: int = 2
) -> Experiment:
    """One training on breast-ultrasound."""
    return _experiment("breast-ultrasound", name, FLAT[width], noise, rate, steps, patches)


def volume(name: str, features: tuple[int, ...], noise: float) -> Experiment:
    """One training on hippocampus."""
    chosen = {**unet(3, features), "patch_size": [24, 32, 24]}
    return _experiment("hippocampus", name, chosen, noise, 0.06, 400, 2)


def _experiment(
    federation: str, name: str, network: dict[str, Any], noise: float, rate: float, steps: int, patches: int
) -> Experiment:
    rounds = max(1, round((2 * steps) ** 0.5))
    settings = {
        **network, **DP_SGD, "training.rounds": rounds, "steps_per_round": steps // rounds, "learning_rate": rate,
        "privacy.sampling_rate": 0.1, "privacy.patches_per_patient": patches, "privacy.noise_multiplier": noise,
        "privacy.delta": 1e-4,
    }  # fmt: skip
    return Experiment(federation, label=f"try-{name}", settings=settings)


def table(work: Private, runs: list[Experiment]) -> str:
    """Every training with its noise over signal; the patients held out are not in it."""
    head = ("federation", "training", "parameters", "K", "steps", "learning rate", "noise multiplier",
            "noise over signal", "Dice, held out")  # fmt: skip
    rows = []
    for run in runs:
        result = work.result(run)
        if result:
            rows.append(_row(work, run, result.content))
    return markdown(head, rows)


def _row(work: Private, run: Experiment, content: dict[str, Any]) -> tuple[str, ...]:
    made = work.plan_of(run)
    told, private, curve = forecast(made), made.agreement.privacy, content["curve"]
    length = made.agreement.training.rounds * made.local.training.steps_per_round
    trained = told.total_ratio * 1.25 if told else float("nan")  # four fifths of the patients, all else the same
    return (
        run.federation, run.label.removeprefix("try-"), f"{made.local.network.parameters / 1e3:.0f} thousand",
        str(private.patches_per_patient), str(length), f"{made.local.training.learning_rate:g}",
        f"{private.noise_multiplier:g}", f"{trained:.2f}", f"{curve[max(curve, key=int)]:.3f}",
    )  # fmt: skip


if __name__ == "__main__":
    main()

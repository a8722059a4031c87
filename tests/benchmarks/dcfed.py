"""Labels instead of weights, on real federations: what each site gains over training alone, and what travels.

    OMP_NUM_THREADS=1 python tests/benchmarks/dcfed.py DATA -o OUT [--federation dermoscopy] [--quick | --full]

DATA holds <federation>/{sites/<site>/, public/, test/{imagesTs,labelsTs}}. Several processes may run beside each other
with the same OUT and share the work; what is finished is not run again; `--table` prints what is known.

All arms take the same steps with the same batch on patients; pooled takes as many in all on the union. A step of dcfed
also has a batch of public images, so that it computes twice as much: "local, twice the steps" has its compute. Each
site holds out a fifth of its patients. Models are the last round's, without mirrored views, scored on the test set that
is common to all. Labels of public images are nowhere: what is agreed on cannot be scored here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from _federations import Bench, Experiment, Result, bench, described, markdown, paired, parser, points, spread

from autofed.federation import metrics
from autofed.network import build, weights_of
from autofed.runs import Run

SEEDS = {"breast-ultrasound": 3, "dermoscopy": 3, "hippocampus": 1}
TWICE = "twice"
ARMS = {
    "local": ("local", ""), "local, twice the steps": ("local", TWICE), "fedavg": ("fedavg", ""),
    "fednova": ("fednova", ""), "dcfed": ("dcfed", ""), "pooled": ("pooled", ""),
}  # fmt: skip
"""Algorithm and label of each arm; the student is scored with dcfed."""


class Twice(Bench):
    """Gives the arm with that label twice the steps of the plan in each round."""

    def plan_of(self, experiment: Experiment):
        made = super().plan_of(experiment)
        steps = made.local.training.steps_per_round
        return made.change({"steps_per_round": 2 * steps}) if experiment.label == TWICE else made


def main() -> None:
    """Run what is missing, then print the tables."""
    told = parser(__doc__, SEEDS)
    told.add_argument("--arm", action="append", choices=list(ARMS))
    args = told.parse_args()
    given, federations = bench(args), args.federation or list(SEEDS)
    work = Twice(given.data, given.out, given.full, given.device)
    seeds = args.seed or range(max(SEEDS.values()))
    wanted = [e for seed in seeds for f in federations for arm in args.arm or ARMS for e in runs(f, arm)
              if e.seed == seed]  # fmt: skip
    failed = 0 if args.table else work.perform(wanted)
    for federation in federations:
        print(table(work, federation), flush=True)
    raise SystemExit(1 if failed else 0)


def runs(federation: str, arm: str) -> list[Experiment]:
    """All seeds of an arm."""
    algorithm, label = ARMS[arm]
    return [Experiment(federation, algorithm, seed, label=label) for seed in range(SEEDS[federation])]


def table(work: Bench, federation: str) -> str:
    """One federation as Markdown."""
    found = {arm: results for arm in ARMS if (results := work.results(runs(federation, arm)))}
    if not found:
        return f"### {federation}\n\nNothing is finished yet.\n"
    every = [result for results in found.values() for result in results]
    return "\n".join([f"### {federation}", "", described(work.plan(federation), every), scores(found), *gains(found),
                      *gap(found), *travelled(work, federation)])  # fmt: skip


def scores(found: dict[str, list[Result]]) -> str:
    """Mean and spread over the seeds, of each site's model and of the mean over the sites."""
    sites = sorted(found[next(iter(found))][0].content["held_out"])
    rows = [(arm, str(len(results)), spread([r.dice("test") for r in results]),
             *(spread([mean(r.cases("test", site)) for r in results]) for site in sites))
            for arm, results in found.items()]  # fmt: skip
    students = [r.student for r in found.get("dcfed", []) if r.student is not None]
    if students:
        rows.append(("dcfed, student", str(len(students)), spread(students), *("" for _ in sites)))
    return markdown(("arm", "seeds", "Dice, test", *sites), rows)


def mean(cases: dict[str, float]) -> float:
    """Over cases."""
    return float(np.mean(list(cases.values())))


def gains(found: dict[str, list[Result]]) -> Iterator[str]:
    """Of every site over the model that it trained alone, with the interval over cases and seeds."""
    sites = sorted(found[next(iter(found))][0].content["held_out"])
    for base in (arm for arm in ("local", "local, twice the steps") if arm in found):
        yield f"Gain on the test set over {base}, points of Dice (95 %).\n"
        yield markdown(("arm", *sites), [
            (arm, *(points(gain(results, found[base], site)) for site in sites))
            for arm, results in found.items() if arm != base
        ])  # fmt: skip


def gain(ours: Sequence[Result], alone: Sequence[Result], site: str) -> tuple[float, ...]:
    """A site's model beside the one that it trained alone, over the seeds that both have."""
    by_seed = [{r.seed: r.cases("test", site) for r in results} for results in (ours, alone)]
    seeds = sorted(set(by_seed[0]) & set(by_seed[1]))
    return paired(*([found[seed] for seed in seeds] for found in by_seed)) if seeds else ()


def gap(found: dict[str, list[Result]]) -> Iterator[str]:
    """The share of the way from local to pooled."""
    if not {"local", "dcfed", "pooled"} <= set(found):
        return
    low, now, high = (float(np.mean([r.dice("test") for r in found[arm]])) for arm in ("local", "dcfed", "pooled"))
    share = f"{100 * (now - low) / (high - low):.0f} %" if high > low else "-"
    yield f"* of the gap between local ({low:.4f}) and pooled ({high:.4f}) dcfed ({now:.4f}) closes {share}"


def travelled(work: Bench, federation: str) -> Iterator[str]:
    """Bytes and agreement of the first seed."""
    experiment = runs(federation, "dcfed")[0]
    run = Run(work.folder(experiment) / "run")
    lines = metrics.read(run.fold_folder(work.fold(federation))) if run.exists else []
    if not lines:
        return
    weights = sum(array.nbytes for array in weights_of(build(run.plan().local.network)).values())
    sites = len(run.identity().sites)
    sent = sum(count for line in lines for way in line["bytes"].values() for count in way.values())
    yield f"* {sent / 1e6:.1f} MB travelled, where weights would have been {2e-6 * weights * sites * len(lines):.1f} MB"
    for line in lines:
        if "notes" in line:
            said = ", ".join(f"{site} {found['disagreement']:.2f}" for site, found in line["sites"].items()
                             if "disagreement" in found)  # fmt: skip
            notes = line["notes"]
            yield (f"* round {line['round']}: {100 * notes['kept_images']:.0f} % of the images and "
                   f"{100 * notes['kept_voxels']:.0f} % of the voxels kept, {100 * notes['changed']:.0f} % of the "
                   f"labels changed; disagreement: {said}")  # fmt: skip
    yield ""


if __name__ == "__main__":
    main()

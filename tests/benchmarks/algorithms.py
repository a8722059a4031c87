"""Seven ways of learning, on real federations: Dice, HD95 and the worst site, at the same total of patches.

    OMP_NUM_THREADS=1 python tests/benchmarks/algorithms.py DATA -o OUT [--federation dermoscopy] [--quick | --full]

DATA holds <federation>/sites/<site>/ and <federation>/test/{imagesTs,labelsTs}. Several processes may run beside each
other with the same OUT and share the work; what is finished is not run again; `--table` prints what is known.

Every run takes the same number of steps with the same batch in all: pooled takes them on the union, the others share
them out over the sites, evenly, or ("uneven") by the sites' patients, so that a round is the same part of an epoch at
each. Each site holds out a fifth of its patients. Every model is scored on the test set common to all and on what each
site held out; a site's own model (local, fedbn) counts for that site, and its mean over the sites on the test set.
Models are the last round's, without mirrored views. Dice is the mean over cases of the mean over a case's structures.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import numpy as np
from _federations import Bench, Experiment, Result, apart, bench, described, markdown, paired, parser, points, spread

ALGORITHMS = ("local", "fedavg", "fedprox", "fednova", "scaffold", "fedbn", "pooled")
BASELINES = ("local", "pooled")
SEEDS = {"dermoscopy": 3, "hippocampus": 3, "breast-ultrasound": 1, "histology": 1}
UNEVEN = ("dermoscopy", "hippocampus")
"""The federations that are also run with uneven steps, one seed; pooled has no sites to be uneven."""

OF_POOLED = 0.98
"""What share of pooled's Dice the best federated result should reach."""

STEPS = ("even", "uneven")


def main() -> None:
    """Run what is missing, then print the tables."""
    told = parser(__doc__, SEEDS)
    told.add_argument("--algorithm", action="append", help="one of those in autofed/algorithms; may be repeated")
    told.add_argument("--steps", action="append", choices=STEPS)
    args = told.parse_args()
    work, federations = bench(args), args.federation or list(SEEDS)
    failed = 0 if args.table else work.perform(wanted(args, federations))
    for federation in federations:
        print(table(work, federation, args.algorithm or ALGORITHMS), flush=True)
    raise SystemExit(1 if failed else 0)


def wanted(args: argparse.Namespace, federations: Sequence[str]) -> Iterator[Experiment]:
    """The runs, the first seed of everything first."""
    names, seeds = args.algorithm or ALGORITHMS, args.seed or range(max(SEEDS.values()))
    for seed in seeds:
        for uneven in [step == "uneven" for step in args.steps or STEPS]:
            for federation in federations:
                those = runs(federation, names, uneven)
                yield from (experiment for experiment in those if experiment.seed == seed)


def runs(federation: str, names: Sequence[str], uneven: bool) -> list[Experiment]:
    """All runs of a federation with even or uneven steps."""
    if uneven and federation not in UNEVEN:
        return []
    seeds = 1 if uneven else SEEDS[federation]
    return [Experiment(federation, name, seed, uneven) for name in names if not (uneven and name == "pooled")
            for seed in range(seeds)]  # fmt: skip


def table(work: Bench, federation: str, names: Sequence[str]) -> str:
    """One federation as Markdown."""
    even = {name: work.results(runs(federation, [name], uneven=False)) for name in names}
    uneven = {name: work.results(runs(federation, [name], uneven=True)) for name in names}
    even = {name: found for name, found in even.items() if found}
    if not even:
        return f"### {federation}\n\nNothing is finished yet.\n"
    every = [result for found in even.values() for result in found]
    return "\n".join([
        f"### {federation}", "", described(work.plan(federation), every), scores(even),
        *uneven_scores(even, uneven), *gains(even), *verdicts(even),
    ])  # fmt: skip


def scores(found: dict[str, list[Result]]) -> str:
    """Mean and spread over the seeds, and the worst site."""
    head = ("algorithm", "seeds", "Dice, test", "HD95, test", "no distance, %", "Dice, held out", "HD95, held out",
            "worst site", "overhead, %", "processor min")  # fmt: skip
    return markdown(head, (row for name, results in found.items() for row in rows(name, results)))


def rows(name: str, results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    """An algorithm; and its common model on a line of its own, if the sites have theirs beside it."""
    yield (
        name, str(len(results)), spread([r.dice("test") for r in results]), mean(r.hd95("test") for r in results),
        f"{100 * np.mean([r.without_distance() for r in results]):.1f}",
        spread([r.dice("held_out") for r in results]), mean(r.hd95("held_out") for r in results), worst(results),
        f"{100 * np.mean([r.overhead for r in results]):.1f}",
        f"{np.mean([r.content['watched']['processor'] for r in results]) / 60:.1f}",
    )  # fmt: skip
    common = [r.common for r in results if r.common is not None]
    if common:
        yield (f"{name}, common model", str(len(common)), spread(common), *("" for _ in range(7)))


def worst(results: Sequence[Result]) -> str:
    """The site with the lowest Dice on what it held out, its mean over the seeds."""
    sites = results[0].each("held_out")
    means = {site: np.mean([r.each("held_out")[site] for r in results]) for site in sites}
    site = min(means, key=lambda s: means[s])
    return f"{means[site]:.4f} ({site})"


def uneven_scores(even: dict[str, list[Result]], uneven: dict[str, list[Result]]) -> Iterator[str]:
    """What becomes of the first seed when the sites' steps follow their patients."""
    rows = []
    for name, found in uneven.items():
        if found and name in even:
            change = apart(found, even[name])
            rows.append((name, spread([r.dice("test") for r in found]), points(change),
                         spread([r.dice("held_out") for r in found]), worst(found)))  # fmt: skip
    if rows:
        seed = next(found for found in uneven.values() if found)[0].seed
        yield f"Uneven steps, seed {seed}; the change to even steps is paired over the test cases."
        yield ""
        yield markdown(("algorithm", "Dice, test", "change, points (95 %)", "Dice, held out", "worst site"), rows)


def gains(found: dict[str, list[Result]]) -> Iterator[str]:
    """Of every site over its own model trained alone: on the test set, and on the patients that it held out."""
    alone = found.get("local", [])
    others = {name: results for name, results in found.items() if name not in BASELINES}
    if not alone or not others:
        return
    every = list(alone[0].content["held_out"])
    for where, said in (("test", "the test set"), ("held_out", "the patients that the site held out")):
        cases = ", ".join(f"{site} {len(alone[0].cases(where, site))}" for site in every)
        yield f"Gain over local on {said}, points of Dice (95 %); cases: {cases}."
        yield ""
        yield markdown(("algorithm", *every), [
            (name, *(points(gain(results, alone, where, site)) for site in every)) for name, results in others.items()
        ])  # fmt: skip


def gain(ours: Sequence[Result], alone: Sequence[Result], where: str, site: str) -> tuple[float, ...]:
    """A site's model beside the one that it trained alone, over the seeds that both have."""
    by_seed = [{r.seed: r.cases(where, site) for r in results} for results in (ours, alone)]
    seeds = sorted(set(by_seed[0]) & set(by_seed[1]))
    return paired(*([found[seed] for seed in seeds] for found in by_seed)) if seeds else ()


def verdicts(found: dict[str, list[Result]]) -> Iterator[str]:
    """How the others stand beside fedavg, and whether the best federated result reaches its share of pooled."""
    beside = [
        f"{name} {points(apart(results, found.get('fedavg', [])))}"
        for name, results in found.items()
        if name not in (*BASELINES, "fedavg")
    ]
    yield f"* beside fedavg on the test set, points of Dice (95 %): {', '.join(beside)}"
    federated = {name: results for name, results in found.items() if name not in BASELINES}
    if "pooled" not in found or not federated:
        return
    for where, said in (("test", "test"), ("held_out", "held out")):
        means = {name: float(np.mean([r.dice(where) for r in results])) for name, results in federated.items()}
        best = max(means, key=lambda n: means[n])
        aim = float(np.mean([r.dice(where) for r in found["pooled"]]))
        reached = "yes" if means[best] >= OF_POOLED * aim else "NO"
        share = f"{100 * means[best] / aim:.1f}" if aim else "-"
        yield (f"* {said}: the best federated is {best}, {means[best]:.4f}, {share} % of pooled ({aim:.4f}); "
               f"{100 * OF_POOLED:g} % reached: {reached}")  # fmt: skip
    yield ""


def mean(values: Iterator[float]) -> str:
    """Over seeds, two digits."""
    return f"{np.mean(list(values)):.2f}"


if __name__ == "__main__":
    main()

"""Labels instead of weights, on real federations: what each site gains over training alone, and what travels.

    OMP_NUM_THREADS=1 python tests/benchmarks/dcfed.py DATA -o OUT [--federation dermoscopy] [--part arms] [--full]

DATA holds <federation>/{sites/<site>/, public/, test/{imagesTs,labelsTs}}. Several processes may run beside each other
with the same OUT and share the work; what is finished is not run again; `--table` prints what is known. How good the
labels are that were agreed on is for dcfed_labels.py.

* arms: all take the same steps with the same batch on patients; pooled takes as many in all on the union. In the second
  act of dcfed (.4 of the rounds) a step also has a batch of public images: the longer local arm computes as much. It
  and fednova, which is fedavg where all sites take as many steps, are run with the first seed only. Each site holds
  out a fifth of its patients. Models are the last round's, without mirrored views, scored on the test set that is
  common to all, and on the patients held out.
* gates: how the defaults of the gates and of the course were chosen, from a few settings fixed beforehand: by the Dice
  of the patients that the sites hold out, with a seed of its own. Neither test sets nor labels of public images have a
  say. Run only if asked for, since it takes as long as all the rest.
* private: at epsilon 8, on the planned private settings, with nobody held out: ADP-FL with weights, and dcfed whose
  teachers ADP-FL trains. The models that sites keep to themselves are trained without it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _federations import (
    Bench,
    Experiment,
    Result,
    apart,
    bench,
    described,
    markdown,
    paired,
    parser,
    points,
    score,
    spread,
)
from _federations import test_set as test_cases
from private_plans import Planned

from autofed import api, plans
from autofed.data.splits import ALL
from autofed.federation import metrics
from autofed.federation.run_folder import GLOBAL, STUDENT, Run
from autofed.inference.predictor import Predictor
from autofed.planner import make_private
from autofed.training.devices import pick_device
from autofed.training.network import build, weights_of

SEEDS = {"breast-ultrasound": 3, "dermoscopy": 3, "hippocampus": 1}
LONGER, FACTOR = "longer", 1.4
ARMS = {
    "local": ("local", ""), f"local, {FACTOR} times the steps": ("local", LONGER), "fedavg": ("fedavg", ""),
    "fednova": ("fednova", ""), "dcfed": ("dcfed", ""), "pooled": ("pooled", ""),
}  # fmt: skip
"""Algorithm and label of each arm; the student is scored with dcfed."""

ONCE = (f"local, {FACTOR} times the steps", "fednova")
"""Arms that need one seed."""

STEPS = {"breast-ultrasound": 180, "dermoscopy": 162, "hippocampus": 28}
"""In a round: two to nine times those of the other scripts, so that a site alone hardly gains from more of them."""

TRIAL_SEED = 100
STRICT: dict[str, float] = {
    "confidence": 0.75, "doubt": 0.85, "share": 0.5, "begin": 0.6, "exchanges": 2, "weight": 1.0, "members": 3,
}  # fmt: skip
TRIALS: dict[str, dict[str, float]] = {
    "strict": STRICT,
    "loose": {**STRICT, "confidence": 0.6, "doubt": 1.0, "share": 0.3},
    "early": {**STRICT, "begin": 0.4},
    "thrice": {**STRICT, "begin": 0.4, "exchanges": 3},
    "heavy": {**STRICT, "weight": 2.0},
    "single": {**STRICT, "members": 1},
}
"""Settings to choose from; local without any is run beside them."""

DEFAULT = ("arms", "private")
PARTS = (*DEFAULT, "gates")
EPSILON = 8


@dataclass(frozen=True)
class Open(Bench):
    """Without privacy; gives the longer arm more steps in each round."""

    steps: int = 0

    def changes(self, federation: str) -> Mapping[str, Any]:
        """Those of the other scripts, for longer: where a site still learns from every step, labels add nothing."""
        steps = self.steps or (0 if self.full else STEPS[federation])
        return {**super().changes(federation), **({"steps_per_round": steps} if steps else {})}

    def plan_of(self, experiment: Experiment) -> plans.Plan:
        """The federation's plan with what is the experiment's own."""
        made = super().plan_of(experiment)
        if experiment.label != LONGER:
            return made
        return made.change({"steps_per_round": round(FACTOR * made.local.training.steps_per_round)})


@dataclass(frozen=True)
class Private(Planned):
    """The planned private settings, for weights and for labels; nobody is held out."""

    def plan_of(self, experiment: Experiment) -> plans.Plan:
        """The private plan of a federation with the algorithm of an arm."""
        made = make_private(self.prepare(experiment.federation), EPSILON, even_if_hopeless=True)
        made = api.change(made, None, {"privacy.mechanism": "adp"})
        return made.change({"algorithm.name": experiment.algorithm, "training.seed": experiment.seed})

    def start(self, experiment: Experiment, made: plans.Plan) -> Path | None:
        """Random weights."""
        return None

    def _score(self, experiment: Experiment, run: Run, made: plans.Plan) -> dict[str, Any]:
        test = test_cases(self.data / experiment.federation / "test", made)
        models = {
            model: Predictor(run.members(model, [ALL])[-1:], device=pick_device(self.device), mirroring=False)
            for model in run.models()
        }
        return {"test": {model: score(found, test, test.cases) for model, found in models.items()}, "held_out": {}}


def main() -> None:
    """Run what is missing, then print the tables."""
    told = parser(__doc__, SEEDS)
    told.add_argument("--part", action="append", choices=PARTS, help="what to run and print; may be repeated")
    told.add_argument("--arm", action="append", choices=list(ARMS))
    told.add_argument("--steps", type=int, default=0, help="in a round, instead of the usual; in a folder of their own")
    args = told.parse_args()
    given, federations, failed = bench(args), args.federation or list(SEEDS), 0
    out = given.out / f"{args.steps}_steps" if args.steps else given.out
    open_arms = Open(given.data, out, given.full, given.device, args.steps)
    private = Private(given.data, given.out / "private", given.full, given.device)
    chosen = args.part or (PARTS if args.table else DEFAULT)
    for part in chosen if not args.table else ():
        failed += (private if part == "private" else open_arms).perform(wanted(part, federations, args.arm, args.seed))
    for part in chosen:
        for federation in federations:
            print(TABLES[part](private if part == "private" else open_arms, federation, args.seed), flush=True)
    sys.exit(1 if failed else 0)


def wanted(
    part: str, federations: Sequence[str], arms: Sequence[str] | None, seeds: Sequence[int] | None
) -> list[Experiment]:
    """The trainings of a part, seed by seed."""
    if part == "arms":
        found = [e for federation in federations for arm in arms or ARMS for e in runs(federation, arm, seeds)]
        return sorted(found, key=lambda e: e.seed)
    if part == "gates":
        return [e for federation in federations if federation != "hippocampus" for e in trials(federation).values()]
    if part == "private":
        return [e for federation in federations if federation != "hippocampus" for e in releases(federation).values()]
    return []


def runs(federation: str, arm: str, seeds: Sequence[int] | None = None) -> list[Experiment]:
    """Some seeds of an arm, or all."""
    algorithm, label = ARMS[arm]
    usual = 1 if arm in ONCE else SEEDS[federation]
    return [Experiment(federation, algorithm, seed, label=label) for seed in seeds or range(usual)]


def trials(federation: str) -> dict[str, Experiment]:
    """What the defaults were chosen from."""
    found = {"local": Experiment(federation, "local", TRIAL_SEED)}
    return found | {
        name: Experiment(federation, "dcfed", TRIAL_SEED, label=name, settings={"algorithm.settings": settings})
        for name, settings in TRIALS.items()
    }


def releases(federation: str) -> dict[str, Experiment]:
    """The private arms."""
    return {"weights": Experiment(federation, "fedavg"), "labels": Experiment(federation, "dcfed")}


def table(work: Bench, federation: str, seeds: Sequence[int] | None) -> str:
    """One federation as Markdown."""
    found = {arm: results for arm in ARMS if (results := work.results(runs(federation, arm, seeds)))}
    if not found:
        return f"### {federation}\n\nNothing is finished yet.\n"
    every = [result for results in found.values() for result in results]
    return "\n".join([f"### {federation}", "", described(work.plan(federation), every), scores(found), *gains(found),
                      *at_home(found), *gap(found), *travelled(work, federation)])  # fmt: skip


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
    for base in (arm for arm in ARMS if ARMS[arm][0] in ("local", "fedavg") and arm in found):
        yield f"Gain on the test set over {base}, points of Dice (95 %).\n"
        yield markdown(("arm", "mean over the sites", *sites), [
            (arm, points(apart(results, found[base])), *(points(gain(results, found[base], site)) for site in sites))
            for arm, results in found.items() if arm != base
        ])  # fmt: skip


def at_home(found: dict[str, list[Result]]) -> Iterator[str]:
    """Of every site's model, or the common one, on the patients that the site itself held out."""
    sites = sorted(found[next(iter(found))][0].content["held_out"])
    every = [result for results in found.values() for result in results]
    scored = {site: set.intersection(*(set(r.cases("held_out", site)) for r in every)) for site in sites}
    yield "Dice of the patients that each site held out, by its own model or the common one (if all arms have one).\n"
    rows = []
    for arm, results in found.items():
        dice = [[float(np.mean([r.cases("held_out", s)[c] for c in scored[s]])) for s in sites] for r in results]
        rows.append((arm, *(spread(column) for column in zip(*[(float(np.mean(d)), *d) for d in dice], strict=True))))
    yield markdown(("arm", "mean over the sites", *sites), rows)
    for base in (arm for arm in ("local", "fedavg") if {arm, "dcfed"} <= set(found)):
        told = ", ".join(f"{site} {points(gain(found['dcfed'], found[base], site, 'held_out'))}" for site in sites)
        yield f"* dcfed over {base} on these, points of Dice (95 %): {told}"
    yield ""


def gain(ours: Sequence[Result], theirs: Sequence[Result], site: str, where: str = "test") -> tuple[float, ...]:
    """A site's model beside that of another arm, over the seeds that both have."""
    by_seed = [{r.seed: r.cases(where, site) for r in results} for results in (ours, theirs)]
    seeds = sorted(set(by_seed[0]) & set(by_seed[1]))
    return paired(*([found[seed] for seed in seeds] for found in by_seed)) if seeds else ()


def gap(found: dict[str, list[Result]]) -> Iterator[str]:
    """The share of the way from local to pooled."""
    if not {"local", "dcfed", "pooled"} <= set(found):
        return
    low, now, high = (float(np.mean([r.dice("test") for r in found[arm]])) for arm in ("local", "dcfed", "pooled"))
    share = f"{100 * (now - low) / (high - low):.0f} %" if high > low else "-"
    yield f"* of the gap between local ({low:.4f}) and pooled ({high:.4f}) dcfed ({now:.4f}) closes {share}"
    alone, ours = ([by_site(r) for r in found[arm]] for arm in ("local", "dcfed"))
    gained = {site: (np.mean([r[site] for r in ours]), np.mean([r[site] for r in alone])) for site in alone[0]}
    best = max(gained, key=lambda site: gained[site][0] - gained[site][1])
    after, before = gained[best]
    yield (f"* the site that gains most is {best}: {100 * (after - before):+.1f} points, "
           f"{100 * (after / before - 1):+.1f} % of what it had alone")  # fmt: skip


def by_site(result: Result) -> dict[str, float]:
    """Dice on the test set of each site's own model."""
    return {site: mean(result.cases("test", site)) for site in sorted(result.content["held_out"])}


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


# --- the gates, and what privacy leaves -------------------------------------------------------------------------------


def of_trials(work: Bench, federation: str, _: Sequence[int] | None) -> str:
    """What the defaults were chosen by."""
    found = {name: result for name, run in trials(federation).items() if (result := work.result(run))}
    rows = [
        (name, told(TRIALS.get(name, STRICT)), f"{r.dice('held_out'):.4f}", f"{r.dice('test'):.4f}",
         "" if r.student is None else f"{r.student:.4f}") for name, r in found.items()
    ]  # fmt: skip
    head = ("trial", "what is unlike the first", "Dice, held out", "Dice, test", "student, test")
    return f"### {federation}: settings to choose from\n\n" + markdown(head, rows) if rows else ""


def told(settings: Mapping[str, float]) -> str:
    """How settings differ from the strict ones."""
    return ", ".join(f"{name} {value:g}" for name, value in settings.items() if value != STRICT[name])


def of_private(work: Bench, federation: str, _: Sequence[int] | None) -> str:
    """Weights against labels at the same promise."""
    rows = [
        (f"{arm}, {model}", f"{mean(result.cases('test', model)):.4f}", seen(model))
        for arm, run in releases(federation).items()
        for result in work.results([run])
        for model in result.content["test"]
    ]
    title = f"### {federation}: epsilon {EPSILON}\n\n"
    return title + markdown(("model", "Dice, test", "who may have it"), rows) if rows else ""


def seen(model: str) -> str:
    """Who may have a model."""
    return "everybody" if model in (GLOBAL, STUDENT) else "that site"


TABLES = {"arms": table, "gates": of_trials, "private": of_private}

if __name__ == "__main__":
    main()

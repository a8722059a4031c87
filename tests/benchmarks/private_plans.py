"""What the planner makes of a promise: beside settings that a person would pick, and whether its grade comes true.

    OMP_NUM_THREADS=1 python tests/benchmarks/private_plans.py DATA -o OUT [--federation dermoscopy] [--part arms]

Runs, folders and scores as in algorithms.py: several processes share the work, and `--table` prints what is known. All
start from the open plan on a coarse grid (QUICK); delta is the default; nobody is held out, and the models are scored
on the test set. The hours are the same for all arms of a federation, by the speed that the plan was made for; the one
arm whose steps are given takes as long as it takes.

* planned: `autofed plan open.json --epsilon E` with those hours.
* by hand: the open plan's network, q .1 and K 1; q .5 and K 4; q .2 and K 1 with 500 steps. The first two take the
  steps that the hours allow; all else is what `--set privacy.mechanism=dp-sgd` begins with, and the plan's own rate.
* open: the open plan without privacy, for the steps that the hours allow.

Parts: `arms` (dermoscopy at 8 and 3), `grades` (planned and open on all federations, also where the plan is refused),
`trade` (dermoscopy: other epsilons, fewer patients, fewer sites) and `public` (planned, from public images). What the
planner's rule was fitted to is in private_rule.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _federations import Bench, Experiment, Result, apart, bench, markdown, parser, points, score, test_set
from privacy import public_start

from autofed import api, plans
from autofed.data import Dataset, open_dataset
from autofed.data.splits import ALL
from autofed.federation.run_folder import GLOBAL, Run
from autofed.files import read_json, write_json
from autofed.inference.predictor import Predictor
from autofed.planner import forecast, make_private
from autofed.planner.hours import USEFUL_SHARE
from autofed.report import drawing
from autofed.training.devices import pick_device

HOURS = {"dermoscopy": 0.1, "breast-ultrasound": 0.1, "hippocampus": 0.15, "histology": 0.03}
SEEDS = dict.fromkeys(HOURS, 1)
HAND = {
    "q .1, K 1": {"privacy.sampling_rate": 0.1, "privacy.patches_per_patient": 1},
    "q .5, K 4": {"privacy.sampling_rate": 0.5, "privacy.patches_per_patient": 4},
    "q .2, 500 steps": {"privacy.sampling_rate": 0.2, "privacy.patches_per_patient": 1},
}
GIVEN_STEPS = {"q .2, 500 steps": 500}
EPSILONS = {"dermoscopy": (8, 3, 1), "breast-ultrasound": (8, 3), "hippocampus": (8, 3), "histology": (8,)}
PARTS = ("arms", "grades", "trade", "public")
SHARES, SITES = (0.5, 0.25), (2, 1)
"""Of dermoscopy's patients at every site, and how many of its sites (the first ones, as they are)."""


@dataclass(frozen=True)
class Planned(Bench):
    """Runs without anybody held out, each for its hours."""

    def fold(self, federation: str) -> str:
        """Everybody is trained on: the forecast counts all patients of the plan."""
        return ALL

    def sites(self, federation: str) -> list[Path]:
        """The folders of the sites, or of some of them with some of their patients: dermoscopy@share@sites."""
        name, share, count = parts(federation)
        whole = super().sites(name)[: count or None]
        return whole if share == 1 else [self._thinned(site, federation, share) for site in whole]

    def _thinned(self, site: Path, federation: str, share: float) -> Path:
        """The site with every so many-th case, by links."""
        folder = self.out / federation / "sites" / site.name
        if not (folder / "dataset.json").is_file():
            every, cases = round(1 / share), sorted(p.name for p in (site / "labelsTr").iterdir())
            kept = {name.split(".")[0] for name in cases[::every]}
            for kind in ("imagesTr", "labelsTr"):
                (folder / kind).mkdir(parents=True, exist_ok=True)
                for path in (site / kind).iterdir():
                    case = path.name.split(".")[0]
                    if (case if kind == "labelsTr" else case.rsplit("_", 1)[0]) in kept:
                        (folder / kind / path.name).symlink_to(path)
            write_json(folder / "dataset.json", {**read_json(site / "dataset.json"), "numTraining": len(kept)})
        return folder

    def plan(self, federation: str) -> plans.Plan:
        """The open plan on a coarse grid, with the hours and the patients of this script."""
        name, share, _ = parts(federation)
        made = super().plan(name)
        patients = {site.name: made.agreement.patients[site.name] for site in self.sites(federation)}
        patients = {site: len(range(0, n, round(1 / share))) for site, n in patients.items()}
        agreement = made.agreement.model_copy(update={
            "patients": patients,
            "faults": made.agreement.faults.model_copy(update={"least_sites": len(patients)}),
        })  # fmt: skip
        budget = made.budget.model_copy(update={"hours": HOURS[name]})
        return made.model_copy(update={"agreement": agreement, "budget": budget}).change({"keep_momentum": True})

    def plan_of(self, experiment: Experiment) -> plans.Plan:
        """What an arm trains."""
        made, arm, epsilon = self.prepare(experiment.federation), *arm_of(experiment)
        if arm == "open":
            made = made.change(length(self._steps(made, {})))
        elif arm in HAND:
            chosen = {"privacy.mechanism": "dp-sgd", **HAND[arm]}
            passes = {site: HAND[arm]["privacy.sampling_rate"] * n for site, n in made.agreement.patients.items()}
            patches = HAND[arm]["privacy.patches_per_patient"]
            steps = GIVEN_STEPS.get(arm) or self._steps(made.change({"batch_size": patches}), passes)
            made = api.change(made, None, {**chosen, "batch_size": patches, **length(steps)}, epsilon=epsilon)
        else:
            made = make_private(made, epsilon, even_if_hopeless=True)
            if experiment.settings:
                made = api.change(made, None, experiment.settings)
        return made.change({"training.seed": experiment.seed})

    def _steps(self, made: plans.Plan, passes: Mapping[str, float]) -> int:
        """Those that fit the hours."""
        training, network = made.local.training, made.local.network
        seconds = made.budget.seconds_per_step(network, training.patch_size, training.batch_size, passes)
        return max(1, int(float(made.budget.hours or 0) * 3600 * USEFUL_SHARE / seconds))

    def start(self, experiment: Experiment, made: plans.Plan) -> Path | None:
        """Weights from public pictures (`privacy.from_public`), where the experiment is about them."""
        if "public" not in experiment.label or (self.folder(experiment) / "run" / "run.json").is_file():
            return None
        return public_start(self, experiment, made)

    def _score(self, experiment: Experiment, run: Run, made: plans.Plan) -> dict[str, Any]:
        predictor = Predictor(run.members(GLOBAL, [ALL])[-1:], device=pick_device(self.device), mirroring=False)
        name, _, _ = parts(experiment.federation)
        test = test_set(self.data / name / "test", made)
        told, training = forecast(made), made.local.training
        return {
            "test": {GLOBAL: score(predictor, test, test.cases)}, "held_out": {},
            "privacy": made.agreement.privacy.model_dump(), "forecast": told.model_dump() if told else None,
            "parameters": made.local.network.parameters, "features": made.local.network.features,
            "steps": made.agreement.training.rounds * training.steps_per_round, "rate": training.learning_rate,
        }  # fmt: skip


def parts(federation: str) -> tuple[str, float, int]:
    """The federation, the share of its patients, how many of its sites (0: all)."""
    name, *rest = federation.split("@")
    return name, float(rest[0]) if rest else 1.0, int(rest[1]) if len(rest) > 1 else 0


def arm_of(experiment: Experiment) -> tuple[str, float | None]:
    """The arm and its epsilon, as the label has them."""
    arm, _, epsilon = experiment.label.partition(" at ")
    return arm, float(epsilon) if epsilon else None


def length(steps: int) -> dict[str, int]:
    """So many steps, in about twice as many rounds as steps in one."""
    rounds = max(1, round((2 * steps) ** 0.5))
    return {"training.rounds": rounds, "steps_per_round": max(1, steps // rounds)}


# --- what is wanted --------------------------------------------------------------------------------------------------


def main() -> None:
    """Run what is missing, then print the tables."""
    told = parser(__doc__, HOURS)
    told.add_argument("--part", action="append", choices=PARTS, help="what to run and print; may be repeated")
    told.add_argument("--only", action="append", help="the runs whose names hold this; may be repeated")
    told.add_argument("--picture", type=Path, help="where to draw the trade, from what is known")
    args = told.parse_args()
    work = Planned(**vars(bench(args)))
    federations, chosen = args.federation or list(HOURS), args.part or PARTS
    runs = {(run.federation, run.name): run for part in chosen for run in wanted(part, federations)}
    found = [run for run in runs.values() if not args.only or any(part in run.label for part in args.only)]
    failed = 0 if args.table else work.perform(found)
    for part in chosen:
        print(TABLES[part](work, federations), flush=True)
    if args.picture:
        args.picture.write_bytes(picture(work))
    raise SystemExit(1 if failed else 0)


def run_of(arm: str, epsilon: float | None = None, federation: str = "dermoscopy", **settings: Any) -> Experiment:
    """One run."""
    return Experiment(federation, label=f"{arm} at {epsilon:g}" if epsilon else arm, settings=settings)


def wanted(part: str, federations: Sequence[str]) -> Iterator[Experiment]:
    """The runs of a part, the most telling first."""
    if part == "arms" and "dermoscopy" in federations:
        yield from (run_of(arm, epsilon) for epsilon in (8, 3) for arm in ("planned", *HAND))
    if part == "grades":
        yield from (run_of("open", None, federation) for federation in federations)
        yield from (run_of("planned", e, federation) for federation in federations for e in EPSILONS[federation])
    if part == "trade" and "dermoscopy" in federations:
        yield from (run_of("planned", epsilon) for epsilon in EPSILONS["dermoscopy"])
        yield from (run_of("planned", 8, federation) for federation in variants())
    if part == "public":
        yield from (run for federation in federations if federation in PUBLIC for run in starts(federation))


PUBLIC = ("dermoscopy", "breast-ultrasound")
"""Federations with unlabelled public pictures."""


def starts(federation: str) -> list[Experiment]:
    """From public images: all weights train, or those on the way up alone."""
    decoder = {"training.trained": "decoder"}
    return [
        run_of("planned public", 8, federation),
        run_of("planned public decoder", 8, federation, **decoder),
    ]


def variants() -> list[str]:
    """Dermoscopy with fewer patients, or fewer sites."""
    return [*(f"dermoscopy@{share}" for share in SHARES), *(f"dermoscopy@1@{count}" for count in SITES)]


# --- tables ----------------------------------------------------------------------------------------------------------


def of_arms(work: Planned, federations: Sequence[str]) -> str:
    """Planned beside what a person would pick."""
    head = ("epsilon", "arm", "parameters", "q", "K", "steps", "noise multiplier", "noise over signal", "grade",
            "Dice, test", "HD95, test", "planned is better by, points (95 %)", "seconds of processor")  # fmt: skip
    rows = []
    for epsilon in (8, 3):
        best = work.results([run_of("planned", epsilon)])
        for arm in ("planned", *HAND):
            for result in work.results([run_of(arm, epsilon)]):
                beside = points(apart(best, [result])) if arm != "planned" and best else ""
                rows.append((f"{epsilon:g}", arm, *described(result), beside, f"{processor(result):.0f}"))
    return "### Planned and by hand\n\n" + stamp(work, [run_of("planned", 8)]) + markdown(head, rows)


def described(result: Result) -> tuple[str, ...]:
    """Parameters to HD95."""
    content, private, told = result.content, result.content["privacy"], result.content["forecast"]
    return (
        f"{content['parameters'] / 1e3:.0f} thousand", f"{private['sampling_rate']:g}",
        str(private["patches_per_patient"]), str(content["steps"]), f"{private['noise_multiplier']:.3g}",
        f"{total_ratio(told):.2f}", told["grade"], f"{result.dice('test'):.4f}", f"{result.hd95('test'):.1f}",
    )  # fmt: skip


def total_ratio(forecast: Mapping[str, Any]) -> float:
    """The noise-to-signal ratio of all steps, also from results that were written when it was called `whole`."""
    return float(forecast["total_ratio"] if "total_ratio" in forecast else forecast["whole"])


def of_grades(work: Planned, federations: Sequence[str]) -> str:
    """Grade, ratio and Dice lost."""
    head = ("federation", "patients a site", "epsilon", "grade", "noise over signal", "Dice, open", "Dice, planned",
            "lost, points (95 %)", "left, %", "without a network", "of what the open one adds to that, %")  # fmt: skip
    rows = []
    for federation in federations:
        for none in work.results([run_of("open", None, federation)]):
            guess = guessed(work, federation)
            for epsilon in EPSILONS[federation]:
                for result in work.results([run_of("planned", epsilon, federation)]):
                    added = (result.dice("test") - guess) / (none.dice("test") - guess)
                    shown = (f"{guess:.3f}", f"{100 * added:.0f}")
                    rows.append((*graded(federation, epsilon, none, result), *shown))
    rows.sort(key=lambda row: float(row[4]))
    return "### Grades\n\n" + stamp(work, [run_of("open", None, f) for f in federations]) + markdown(head, rows)


def guessed(work: Planned, federation: str) -> float:
    """Dice on the test set of what needs no network: one map for every case, or one threshold of one channel.

    Cases are looked at 64 pixels, or 24 voxels, wide, channels as z-scores. The share of labels from which the map
    counts a place, or channel, side and threshold, are the best for the sites' own cases, structure by structure; the
    mean over structures, the better of both.
    """
    held = [open_dataset(site) for site in work.sites(federation)]
    known = [_coarse(data, case) for data in held for case in data.cases]
    test = test_set(work.data / federation / "test", work.plan(federation))
    asked = [_coarse(test, case) for case in test.cases]
    values = sorted({int(value) for _, label in known for value in np.unique(label)} - {0})
    return max(float(np.mean([_best(kind, known, asked, value) for value in values])) for kind in (_maps, _cuts))


Known = Sequence[tuple[np.ndarray, np.ndarray]]
Rule = Callable[[np.ndarray], np.ndarray]


def _best(kind: Callable[[Known, int], list[Rule]], known: Known, asked: Known, value: int) -> float:
    return _dice(max(kind(known, value), key=lambda rule: _dice(rule, known, value)), asked, value)


def _maps(known: Known, value: int) -> list[Rule]:
    mean = np.mean([label == value for _, label in known], axis=0)
    return [lambda image, share=share: mean >= share for share in np.linspace(0.05, 0.95, 19)]


def _cuts(known: Known, value: int) -> list[Rule]:
    return [
        lambda image, channel=channel, side=side, cut=cut: side * image[channel] > cut
        for channel in range(len(known[0][0])) for side in (1, -1) for cut in np.linspace(-2, 2, 21)
    ]  # fmt: skip


def _coarse(dataset: Dataset, case: str) -> tuple[np.ndarray, np.ndarray]:
    read = dataset.read(case)
    width = 64 if read.label.shape[0] == 1 else 24
    places = np.ix_(*(np.linspace(0, size - 1, min(size, width)).round().astype(int) for size in read.label.shape))
    image = np.stack([channel[places] for channel in read.image]).astype(float)
    axes = tuple(range(1, image.ndim))
    spread = image.std(axes, keepdims=True) + 1e-6
    return (image - image.mean(axes, keepdims=True)) / spread, read.label[places]


def _dice(rule: Rule, known: Known, value: int) -> float:
    pairs = [(rule(image), label == value) for image, label in known]
    return float(
        np.mean([2 * (guess & held).sum() / (guess.sum() + held.sum()) for guess, held in pairs if held.any()])
    )


def graded(federation: str, epsilon: float, none: Result, result: Result) -> tuple[str, ...]:
    """One line of the table of grades."""
    told = result.content["forecast"]
    sites = [site["patients"] for site in told["sites"].values()]
    return (
        federation, f"{min(sites)} to {max(sites)}", f"{epsilon:g}", told["grade"], f"{total_ratio(told):.2f}",
        f"{none.dice('test'):.4f}", f"{result.dice('test'):.4f}", points(apart([result], [none])),
        f"{100 * result.dice('test') / none.dice('test'):.0f}",
    )  # fmt: skip


def of_trade(work: Planned, federations: Sequence[str]) -> str:
    """Dermoscopy with another epsilon, fewer patients, fewer sites."""
    runs = trades()
    head = ("patients", "n by site", "epsilon", "grade", "noise over signal", "Dice, test")
    rows = []
    for which, run in runs:
        for result in work.results([run]):
            told = result.content["forecast"]
            numbers = ", ".join(str(site["patients"]) for site in told["sites"].values())
            rows.append((which, numbers, f"{arm_of(run)[1]:g}", told["grade"], f"{total_ratio(told):.2f}",
                         f"{result.dice('test'):.4f}"))  # fmt: skip
    return "### The trade\n\n" + stamp(work, [run for _, run in runs]) + markdown(head, rows)


def trades() -> list[tuple[str, Experiment]]:
    """Which patients, and their run."""
    runs = [("all", run_of("planned", epsilon)) for epsilon in EPSILONS["dermoscopy"]]
    runs += [(f"{share:g} of the patients", run_of("planned", 8, f"dermoscopy@{share}")) for share in SHARES]
    return runs + [(f"sites, the first {count}", run_of("planned", 8, f"dermoscopy@1@{count}")) for count in SITES]


def of_public(work: Planned, federations: Sequence[str]) -> str:
    """From public images, and from nothing."""
    head = ("federation", "start", "Dice, test", "gain, points (95 %)")
    rows = []
    for federation in (f for f in federations if f in PUBLIC):
        plain = work.results([run_of("planned", 8, federation)])
        rows += [(federation, "random weights", f"{found.dice('test'):.4f}", "") for found in plain]
        for name, run in zip(("public images", "public images, decoder trains"), starts(federation), strict=True):
            rows += [(federation, name, f"{found.dice('test'):.4f}", points(apart([found], plain)))
                     for found in work.results([run])]  # fmt: skip
    return "### From public images, epsilon 8\n\n" + markdown(head, rows)


def picture(work: Planned) -> bytes:
    """Dice against epsilon, patients and sites, beside the open training."""
    known = [(which, run, result) for which, run in trades() for result in work.results([run])]
    dice = {(which, arm_of(run)[1]): result.dice("test") for which, run, result in known}
    patients = {which: sum(site["patients"] for site in result.content["forecast"]["sites"].values())
                for which, _, result in known}  # fmt: skip
    panels = {
        "epsilon": {epsilon: found for (which, epsilon), found in dice.items() if which == "all"},
        "patients, epsilon 8": {patients[which]: found for (which, epsilon), found in dice.items()
                                if epsilon == 8 and "sites" not in which},
        "sites, epsilon 8": {4 if which == "all" else int(which.split()[-1]): found
                             for (which, epsilon), found in dice.items() if epsilon == 8 and "patients" not in which},
    }  # fmt: skip
    figure = drawing.figure(9.6, 3.0, layout="constrained")
    for axes, (what, found) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        order = sorted(found)
        axes.plot(order, [found[x] for x in order], color=drawing.LINES[0], marker="o")
        for none in work.results([run_of("open")]):
            axes.axhline(none.dice("test"), color=drawing.QUIET, linestyle=":", label="without privacy")
        axes.set_xlabel(what)
        axes.set_xticks(order)
        axes.set_ylim(0, 1)
    figure.axes[0].set_ylabel("Dice, test")
    figure.axes[0].legend(frameon=False, loc="lower right", fontsize=9)
    return drawing.png(figure)


def processor(result: Result) -> float:
    """Seconds of the processor in training."""
    return float(result.content["watched"]["processor"])


def stamp(work: Planned, runs: Sequence[Experiment]) -> str:
    """Where and when."""
    found = {
        "{machine}, {threads} threads, {precision}; {date}; {commit}".format(**r.content["about"])
        for r in work.results(runs)
    }
    return " / ".join(sorted(found)) + ".\n\n"


TABLES = {"arms": of_arms, "grades": of_grades, "trade": of_trade, "public": of_public}

if __name__ == "__main__":
    main()

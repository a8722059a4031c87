"""One training for each fold: who is held out, the sites, the rounds, and the scores of whole held-out cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from autofed import algorithms, privacy
from autofed.algorithms import Algorithm
from autofed.batches import Feeder
from autofed.exchange import Release, ServerState
from autofed.federation import rounds, states
from autofed.federation.inprocess import InProcess
from autofed.federation.site import Site
from autofed.files import digest, read_json, write_json
from autofed.labels import Labels
from autofed.network import build, weights_of
from autofed.parallel import Progress
from autofed.plans import Plan
from autofed.postprocessing import RULES, decide
from autofed.prepared import Store, pool
from autofed.problems import gathered, refuse
from autofed.runs import VALIDATION, Identity, Run
from autofed.splits import ALL, Split, split

POOLED = "pooled"


class StepCounter:
    """Tells the progress how many of all steps of all sites and folds are done."""

    def __init__(self, made: Plan, folds: int, progress: Progress):
        self.per_round = sum(made.steps_at(site) for site in made.agreement.patients)
        self.per_fold = self.per_round * made.agreement.training.rounds
        self.total = self.per_fold * folds
        self.progress = progress
        self.done = self.before = 0

    def begin(self, rounds: int) -> None:
        """A fold begins, or goes on after so many rounds."""
        self.done = self.before + rounds * self.per_round
        self.before += self.per_fold
        self.progress("training", self.done, self.total)

    def __call__(self) -> None:
        """A site has taken a step."""
        self.done = min(self.done + 1, self.total)
        self.progress("training", self.done, self.total)


@dataclass(frozen=True)
class Folds:
    """All that the trainings of a run share."""

    run: Run
    plan: Plan
    algorithm: Algorithm
    identity: Identity
    stores: Mapping[str, Store]
    work: Path
    device: str
    feeder: Feeder
    trusted: tuple[str, ...]
    counter: StepCounter

    def check(self, folds: Sequence[str]) -> None:
        """`Problems` if patients cannot be held out as asked for or changed sides, or if a site cannot take part."""
        refuse("--algorithm", self._cannot_be_pooled())
        private = self._is_private
        problems = ["k folds spend a patient's privacy k - 1 times; train one"] if private and len(folds) > 1 else []
        refuse("--fold", problems)
        splits = dict(zip(folds, gathered("--fold", [partial(self._splits, fold) for fold in folds]), strict=True))
        nobody = [f for f, found in splits.items() if f != ALL and not any(s.validation for s in found.values())]
        refuse("--fold", [
            f"no site holds out a patient in fold {f}: each has fewer than five, or says so in its splits.json; write "
            "--fold all" for f in nobody
        ])  # fmt: skip
        refuse("--fold", [f"fold {f} leaves {name} nobody to train on; write --fold all, or another"
                          for f, found in splits.items() for name, s in found.items() if not s.train])  # fmt: skip
        refuse("--fold", [p for fold, found in splits.items() for p in self._changes(fold, found)])
        for fold, found in splits.items():
            self._sites(fold, found)

    def train(self, fold: str) -> None:
        """Train a fold to its end, from where it is, then score its model on whole held-out cases."""
        folder, splits = self.run.fold_folder(fold), self._splits(fold)
        sites = self._sites(fold, splits)
        for name, parted in splits.items():
            write_json(self.run.site_folder(name, fold) / "split.json", _sides(parted))
        course = rounds.Course(
            self.algorithm, privacy.find(self.plan), self.plan, InProcess(sites), folder, self._name(fold),
            self.identity.sites, holds_out=bool(self.plan.agreement.training.validate_every) and fold != ALL,
        )  # fmt: skip
        saved = states.saved_rounds(folder)
        state = states.load(folder, saved[-1]) if saved else self.algorithm.start(self._setup(fold))
        self.counter.begin(state.round)
        state = rounds.run(course, state)
        if course.holds_out:
            self._verify(course, state)
            self._decide()

    def _verify(self, course: rounds.Course, state: ServerState) -> None:
        """Score whole held-out cases once, and again when a training has been given more rounds."""
        path = course.folder / VALIDATION
        if not path.is_file() or read_json(path)["rounds"] != state.round:
            write_json(path, {"rounds": state.round, "sites": _table(rounds.verify(course, state))})

    @property
    def _is_private(self) -> bool:
        return self.plan.agreement.privacy.mechanism != "none"

    def _cannot_be_pooled(self) -> list[str]:
        """One step on patches of several sites has one loss, and what was annotated differs from site to site."""
        partial = self.plan.agreement.annotated
        if not partial or not algorithms.gathers(self.algorithm):
            return []
        shown = "; ".join(f"{site} only {', '.join(names)}" for site, names in partial.items())
        name = self.plan.agreement.algorithm.name
        return [f"{name} trains on all sites' patches at once, but they annotated other structures ({shown}); name an "
                "algorithm that trains at each site, or plan without these sites"]  # fmt: skip

    def _name(self, fold: str) -> str:
        """What requests call the run: every fold is another one to the sites' ledgers."""
        return self.identity.id if fold == ALL else f"{self.identity.id}-fold-{fold}"

    def _setup(self, fold: str) -> algorithms.Setup:
        """What a fold starts from: the weights given, or its own random ones."""
        given = self.run.start()
        seed = self.plan.local.training.seed
        seed = seed if fold == ALL else int(digest([seed, fold])[:8], 16)
        return algorithms.Setup(self.plan, given or weights_of(build(self.plan.local.network, seed=seed)))

    def _splits(self, fold: str) -> dict[str, Split]:
        work = [partial(split, s.patients, fold, self.work / name, private=self._is_private)
                for name, s in self.stores.items()]  # fmt: skip
        return dict(zip(self.stores, gathered(f"fold {fold}", work), strict=True))

    def _changes(self, fold: str, splits: Mapping[str, Split]) -> list[str]:
        """Who changed sides since the fold was begun: their scores would be worth nothing."""
        paths = {name: self.run.site_folder(name, fold) / "split.json" for name in splits}
        return [
            f"the patients of {name} are not parted as when fold {fold} was begun; begin a new run, or restore them"
            for name, path in paths.items()
            if path.is_file() and read_json(path) != _sides(splits[name])
        ]

    def _sites(self, fold: str, splits: Mapping[str, Split]) -> list[Site]:
        train = {name: store.only(splits[name].train) for name, store in self.stores.items()}
        held = {name: store.only(splits[name].validation) for name, store in self.stores.items()}
        ledgers = {name: self.work / name / "ledger.jsonl" for name in self.stores}
        if algorithms.gathers(self.algorithm):
            return [self._site(POOLED, fold, pool(train), pool(held), ledgers)]
        return [self._site(name, fold, train[name], held[name], {name: ledgers[name]}) for name in self.stores]

    def _site(self, name: str, fold: str, train: Store, held: Store, ledgers: Mapping[str, Path]) -> Site:
        return Site(
            name, train, self.plan, self.run.site_folder(name, fold), ledgers, run=self._name(fold), held=held,
            stream=name if fold == ALL else f"{name}/fold_{fold}", device=self.device, feeder=self.feeder,
            trusted=self.trusted, on_step=self.counter,
        )  # fmt: skip

    def _decide(self) -> None:
        """Decide what is done to predictions from the held-out cases of all folds so far."""
        totals = {name: np.zeros((2, len(RULES))) for name in Labels.of(self.plan.agreement).names}
        for path in sorted(self.run.folder.glob(f"fold_*/{VALIDATION}")):
            for found in read_json(path)["sites"].values():
                for name, rows in found.items():
                    totals[name] += np.array([rows["sums"], rows["cases"]])
        with np.errstate(invalid="ignore"):
            self.run.save_postprocessing(decide({name: sums / cases for name, (sums, cases) in totals.items()}))


def _sides(parted: Split) -> dict[str, list[str]]:
    return {"train": list(parted.train), "validation": list(parted.validation)}


def _table(releases: Sequence[Release]) -> dict[str, dict[str, dict[str, object]]]:
    """By site and structure: mean Dice, and the sums of Dice and the cases for each rule of postprocessing."""
    with_scores = (r for r in releases if "sums" in r.arrays)
    return {r.site: {name: _row(found) for name, found in r.arrays["sums"].items()} for r in with_scores}


def _row(found: np.ndarray) -> dict[str, object]:
    (sums, cases) = found.astype(float).tolist()
    return {"dice": round(sums[0] / cases[0], 4) if cases[0] else None, "sums": sums, "cases": cases}

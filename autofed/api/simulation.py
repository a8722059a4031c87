"""One training for each fold on this machine: who is held out, and the sites that answer in turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from autofed.api.coordinator import Coordinator
from autofed.data.splits import ALL, Split
from autofed.errors import collect_errors, raise_if_any
from autofed.federation.node import (
    ledger_path,
    open_public_of,
    request_name,
    run_id_of,
    save_split,
    split_patients,
    split_problems,
    stream_name,
)
from autofed.federation.site import Site, SiteData, SiteIdentity, SiteStorage
from autofed.federation.transports.in_process import InProcess
from autofed.parallel import Progress
from autofed.plans import Plan
from autofed.preprocessing import Store, pool_stores
from autofed.privacy import guarantee
from autofed.training.batches import PatchLoader
from autofed.training.fit import Compute

POOLED = "pooled"


class StepCounter:
    """Tells the progress how many of all steps of all sites and folds are done."""

    def __init__(self, made: Plan, folds: int, progress: Progress, plans: Mapping[str, Plan] | None = None):
        own = plans or {}
        self.per_round = sum(own.get(site, made).steps_at(site) for site in made.agreement.patients)
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
class Simulation:
    """All that the trainings of a run share. `plans` are those of sites whose network or grid is not the run's."""

    coordinator: Coordinator
    stores: Mapping[str, Store]
    work: Path
    device: str
    loader: PatchLoader
    trusted: tuple[str, ...]
    counter: StepCounter
    simulation: bool = False
    public: Path | None = None
    plans: Mapping[str, Plan] = field(default_factory=dict)

    def check(self, folds: Sequence[str]) -> None:
        """`Problems` if patients cannot be held out as asked for or changed sides, or if a site cannot take part."""
        raise_if_any("--algorithm", self._cannot_be_pooled())
        raise_if_any("--fold", self._spent_by_folds(folds))
        raise_if_any("the plan", guarantee.problems(self.coordinator.plan, self._steps()))
        splits = dict(
            zip(folds, collect_errors("--fold", [partial(self._splits, fold) for fold in folds]), strict=True)
        )
        nobody = [f for f, found in splits.items() if f != ALL and not any(s.validation for s in found.values())]
        raise_if_any("--fold", [
            f"no site holds out a patient in fold {f}: each has fewer than five, or says so in its splits.json; write "
            "--fold all" for f in nobody
        ])  # fmt: skip
        raise_if_any("--fold", [problem for f, found in splits.items() for name, parted in found.items()
                          for problem in split_problems(name, f, parted, self._folder(name, f))])  # fmt: skip
        sites = [site for fold, found in splits.items() for site in self._sites(fold, found)]
        raise_if_any("the ledgers", [] if self.coordinator.run.folds() else self._unaffordable(sites))

    def train(self, fold: str) -> None:
        """Train a fold to its end, from where it is, then score its model on whole held-out cases."""
        splits = self._splits(fold)
        sites = self._sites(fold, splits)
        for name, parted in splits.items():
            save_split(self._folder(name, fold), parted)
        self.coordinator.train(fold, InProcess(sites), self.counter.begin)

    def _unaffordable(self, sites: Sequence[Site]) -> list[str]:
        """Which ledgers have no room for the whole training, which would end in the middle; unless it has begun."""
        plan, run = self.coordinator.plan, self.coordinator.identity.id
        return [
            f"{ledger.opening.site}: of its ceiling of epsilon {ledger.opening.ceiling_epsilon:g} this plan would pass "
            f"what is left ({ledger.counted():.4g} is counted); look with autofed ledger {ledger.path}"
            for site in sites
            for ledger in site.ledgers
            if not any(run_id_of(charge.run) == run for charge in ledger.charges())
            and not ledger.can_afford(guarantee.training_events(plan, site.steps))
        ]

    def _spent_by_folds(self, folds: Sequence[str]) -> list[str]:
        private = self.coordinator.plan.agreement.privacy.is_private
        if not private or len({*folds, *self.coordinator.run.folds()}) == 1:
            return []
        return ["k folds spend a patient's privacy k - 1 times, and the plan promises it for one training; train one"]

    def _steps(self) -> dict[str, int]:
        """The steps in a round that each patient of a site may take part in."""
        plan = self.coordinator.plan
        own = {site: self._plan(site).steps_at(site) for site in plan.agreement.patients}
        return {POOLED: sum(own.values())} if self.coordinator.algorithm.centralised else own

    def _cannot_be_pooled(self) -> list[str]:
        """One step on patches of several sites has one loss, and what was annotated differs from site to site."""
        partial = self.coordinator.plan.agreement.annotated
        if not partial or not self.coordinator.algorithm.centralised:
            return []
        shown = "; ".join(f"{site} only {', '.join(names)}" for site, names in partial.items())
        name = self.coordinator.plan.agreement.algorithm.name
        return [f"{name} trains on all sites' patches at once, but they annotated other structures ({shown}); name an "
                "algorithm that trains at each site, or plan without these sites"]  # fmt: skip

    def _plan(self, site: str) -> Plan:
        return self.plans.get(site, self.coordinator.plan)

    def _folder(self, site: str, fold: str) -> Path:
        return self.coordinator.run.site_folder(site, fold)

    def _splits(self, fold: str) -> dict[str, Split]:
        plan = self.coordinator.plan
        work = [partial(split_patients, self.work, name, plan, store, fold) for name, store in self.stores.items()]
        return dict(zip(self.stores, collect_errors(f"fold {fold}", work), strict=True))

    def _sites(self, fold: str, splits: Mapping[str, Split]) -> list[Site]:
        train = {name: store.only(splits[name].train) for name, store in self.stores.items()}
        held = {name: store.only(splits[name].validation) for name, store in self.stores.items()}
        ledgers = {name: self._ledger(name) for name in self.stores}
        if self.coordinator.algorithm.centralised:
            return [self._site(POOLED, fold, pool_stores(train), pool_stores(held), ledgers)]
        return [self._site(name, fold, train[name], held[name], {name: ledgers[name]}) for name in self.stores]

    def _ledger(self, site: str) -> Path:
        """The site's own over all runs; in a simulation one of this run."""
        if self.simulation:
            return self.coordinator.run.ledgers_folder / f"{site}.jsonl"
        return ledger_path(self.work, site)

    def _site(self, name: str, fold: str, train: Store, held: Store, ledgers: Mapping[str, Path]) -> Site:
        return Site(
            SiteIdentity(name, request_name(self.coordinator.identity.id, fold), stream_name(name, fold)),
            self._plan(name),
            SiteData(train, held, open_public_of(self._plan(name), self.public, self.work)),
            SiteStorage(self._folder(name, fold), ledgers, self.simulation),
            Compute(self.device, self.loader, self.counter),
            trusted=self.trusted,
            on_image=partial(self.counter.progress, f"{name} labels public images"),
        )  # fmt: skip

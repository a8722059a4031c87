"""Simulation of a federation on this machine: one training for each fold, whose sites train one after the other."""

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
    """Reports how many steps of all sites and folds are done."""

    def __init__(self, plan: Plan, folds: int, progress: Progress, plans: Mapping[str, Plan] | None = None):
        site_plans = plans or {}
        self.per_round = sum(site_plans.get(site, plan).steps_at(site) for site in plan.agreement.patients)
        self.per_fold = self.per_round * plan.agreement.training.rounds
        self.total = self.per_fold * folds
        self.progress = progress
        self.done = self.before = 0

    def begin(self, rounds: int) -> None:
        """Start a fold, or continue it after so many rounds."""
        self.done = self.before + rounds * self.per_round
        self.before += self.per_fold
        self.progress("training", self.done, self.total)

    def __call__(self) -> None:
        """Count one step of a site."""
        self.done = min(self.done + 1, self.total)
        self.progress("training", self.done, self.total)


@dataclass(frozen=True)
class Simulation:
    """Everything that the folds of a run share. `plans` are those of sites with another network or grid."""

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
        """`ValidationErrors` if the folds cannot be held out, patients changed sides, or a site cannot take part."""
        raise_if_any("--algorithm", self._pooling_problems())
        raise_if_any("--fold", self._fold_privacy_problems(folds))
        raise_if_any("the plan", guarantee.problems(self.coordinator.plan, self._steps()))
        splits = dict(
            zip(folds, collect_errors("--fold", [partial(self._splits, fold) for fold in folds]), strict=True)
        )
        empty_folds = [
            f for f, fold_splits in splits.items() if f != ALL and not any(s.validation for s in fold_splits.values())
        ]
        raise_if_any("--fold", [
            f"no site holds out a patient in fold {f}: each has fewer than five, or says so in its splits.json; write "
            "--fold all" for f in empty_folds
        ])  # fmt: skip
        raise_if_any("--fold", [problem for f, fold_splits in splits.items() for name, split in fold_splits.items()
                          for problem in split_problems(name, f, split, self._folder(name, f))])  # fmt: skip
        sites = [site for fold, fold_splits in splits.items() for site in self._sites(fold, fold_splits)]
        raise_if_any("the ledgers", [] if self.coordinator.run.folds() else self._budget_problems(sites))

    def train(self, fold: str) -> None:
        """Train a fold from its last finished round to its end, then score its model on whole held-out cases."""
        splits = self._splits(fold)
        sites = self._sites(fold, splits)
        for name, split in splits.items():
            save_split(self._folder(name, fold), split)
        self.coordinator.train(fold, InProcess(sites), self.counter.begin)

    def _budget_problems(self, sites: Sequence[Site]) -> list[str]:
        """Ledgers whose remaining budget is too small for the whole training, unless it has already begun."""
        plan, run = self.coordinator.plan, self.coordinator.identity.id
        return [
            f"{ledger.opening.site}: of its ceiling of epsilon {ledger.opening.ceiling_epsilon:g} this plan would pass "
            f"what is left ({ledger.counted():.4g} is counted); look with autofed ledger {ledger.path}"
            for site in sites
            for ledger in site.ledgers
            if not any(run_id_of(charge.run) == run for charge in ledger.charges())
            and not ledger.can_afford(guarantee.training_events(plan, site.steps))
        ]

    def _fold_privacy_problems(self, folds: Sequence[str]) -> list[str]:
        is_private = self.coordinator.plan.agreement.privacy.is_private
        if not is_private or len({*folds, *self.coordinator.run.folds()}) == 1:
            return []
        return [
            "k folds spend a patient's privacy k - 1 times, and the plan's guarantee is for one training; train one"
        ]

    def _steps(self) -> dict[str, int]:
        """By site, the steps in a round in which each of its patients may take part."""
        plan = self.coordinator.plan
        steps = {site: self._plan(site).steps_at(site) for site in plan.agreement.patients}
        return {POOLED: sum(steps.values())} if self.coordinator.algorithm.centralised else steps

    def _pooling_problems(self) -> list[str]:
        """Pooled training has one loss for all sites, so all must have annotated the same structures."""
        annotated = self.coordinator.plan.agreement.annotated
        if not annotated or not self.coordinator.algorithm.centralised:
            return []
        sites = "; ".join(f"{site} only {', '.join(names)}" for site, names in annotated.items())
        name = self.coordinator.plan.agreement.algorithm.name
        return [f"{name} trains on all sites' patches at once, but they annotated other structures ({sites}); name an "
                "algorithm that trains at each site, or plan without these sites"]  # fmt: skip

    def _plan(self, site: str) -> Plan:
        return self.plans.get(site, self.coordinator.plan)

    def _folder(self, site: str, fold: str) -> Path:
        return self.coordinator.run.site_folder(site, fold)

    def _splits(self, fold: str) -> dict[str, Split]:
        plan = self.coordinator.plan
        tasks = [partial(split_patients, self.work, name, plan, store, fold) for name, store in self.stores.items()]
        return dict(zip(self.stores, collect_errors(f"fold {fold}", tasks), strict=True))

    def _sites(self, fold: str, splits: Mapping[str, Split]) -> list[Site]:
        train = {name: store.only(splits[name].train) for name, store in self.stores.items()}
        held_out = {name: store.only(splits[name].validation) for name, store in self.stores.items()}
        ledgers = {name: self._ledger(name) for name in self.stores}
        if self.coordinator.algorithm.centralised:
            return [self._site(POOLED, fold, pool_stores(train), pool_stores(held_out), ledgers)]
        return [self._site(name, fold, train[name], held_out[name], {name: ledgers[name]}) for name in self.stores]

    def _ledger(self, site: str) -> Path:
        """The path of the site's own ledger over all runs; in a simulation of one of this run."""
        if self.simulation:
            return self.coordinator.run.ledgers_folder / f"{site}.jsonl"
        return ledger_path(self.work, site)

    def _site(self, name: str, fold: str, train: Store, held_out: Store, ledgers: Mapping[str, Path]) -> Site:
        return Site(
            SiteIdentity(name, request_name(self.coordinator.identity.id, fold), stream_name(name, fold)),
            self._plan(name),
            SiteData(train, held_out, open_public_of(self._plan(name), self.public, self.work)),
            SiteStorage(self._folder(name, fold), ledgers, self.simulation),
            Compute(self.device, self.loader, self.counter),
            trusted=self.trusted,
            on_image=partial(self.counter.progress, f"{name} labels public images"),
        )  # fmt: skip

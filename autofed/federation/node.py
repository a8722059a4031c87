"""A site on a machine of its own: its preprocessed data, held-out patients, ledger, and responses to requests."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from autofed import __version__, plans
from autofed.data.labels import Labels
from autofed.data.splits import ALL, Split, split
from autofed.errors import ValidationErrors, raise_if_any
from autofed.files import Record, read_json, write_json
from autofed.messages import Failure, Request, from_bytes, to_bytes
from autofed.plans import Plan
from autofed.preprocessing import PublicImages, Store, open_public, open_store
from autofed.privacy import guarantee
from autofed.training.batches import PatchLoader, Workers, memory_bytes

if TYPE_CHECKING:
    from autofed.federation.site import Site

MOST_WORKERS = 12
"""More processes than these are never busy (nnU-Net's default)."""

_REQUEST_NAME = re.compile(r"([0-9a-f]{32})(?:-fold-(0|[1-9]\d{0,2}))?")


def open_data(work: Path, site: str, plan: Plan) -> Store:
    """A site's preprocessed data; `ValidationErrors` if there is none, or not that which the plan counts on."""
    store = open_store(work, site, plan.local)
    patients, planned_patients = len(store.patients), plan.agreement.patients[site]
    labels, planned_structures = Labels.of(plan.agreement), plan.agreement.annotated.get(site, ())
    problems = []
    if patients != planned_patients:
        problems.append(f"{site} has {patients} patients with labels, the plan says {planned_patients}; plan again")
    if labels.with_annotated(store.annotated) != labels.with_annotated(planned_structures):
        problems.append(f"{site} annotated other structures than the plan says; plan and preprocess again")
    raise_if_any(str(work / site), problems)
    return store


def open_public_of(plan: Plan, folder: Path | None, work: Path) -> PublicImages | None:
    """The public images that the plan's algorithm labels, prepared in WORK/public; None if it labels none.

    `ValidationErrors` names how they differ from those agreed on, and what is missing.
    """
    from autofed import algorithms

    if not plan.agreement.public_images or not algorithms.find(plan.agreement.algorithm.name).shares_pseudo_labels:
        return None
    if folder is None:
        found = f"the plan agrees on {len(plan.agreement.public_images)} public images"
        raise ValidationErrors("--public", [f"{found}; name the folder that holds them"])
    return open_public(folder, plan, work)


def split_patients(work: Path, site: str, plan: Plan, store: Store, fold: str) -> Split:
    """Who trains and who is held out of a site's patients; its own splits.json counts."""
    return split(store.patients, fold, work / site, private=plan.agreement.privacy.is_private)


def split_problems(site: str, fold: str, partition: Split, folder: Path) -> list[str]:
    """Why a site cannot train a fold: nobody is left to train on, or patients changed sides since it was begun.

    `folder` is the site's own in this fold. Scores of patients who changed sides would be worth nothing.
    """
    path = folder / "split.json"
    problems = []
    if not partition.train:
        problems.append(f"fold {fold} leaves {site} nobody to train on; write --fold all, or another")
    if path.is_file() and read_json(path) != _sides(partition):
        changed = f"the patients of {site} are not split as when fold {fold} was begun"
        problems.append(f"{changed}; begin a new run, or restore them")
    return problems


def save_split(folder: Path, partition: Split) -> None:
    """Write down who is held out, in the site's own folder of this fold."""
    write_json(folder / "split.json", _sides(partition))


def ledger_path(work: Path, site: str) -> Path:
    """The site's ledger, over all runs."""
    return work / site / "ledger.jsonl"


def request_name(run: str, fold: str) -> str:
    """What requests call a training: every fold is another one to the sites' ledgers."""
    return run if fold == ALL else f"{run}-fold-{fold}"


def run_id_of(request: str) -> str:
    """The run of which requests call a training so."""
    return request.partition("-fold-")[0]


def stream_name(site: str, fold: str) -> str:
    """What names a site's draws in a fold."""
    return site if fold == ALL else f"{site}/fold_{fold}"


def workers_for(plan: Plan, device: str) -> Workers:
    """Who makes the patches if nobody says so: a thread beside a CPU's training, as many processes as fit beside a GPU.

    They may take a quarter of the memory, with what a process takes by itself.
    """
    if device == "cpu":
        return "thread"
    from autofed.training.devices import machine_memory_bytes

    training, channels = plan.local.training, len(plan.agreement.channels)
    most = min(MOST_WORKERS, (os.cpu_count() or 1) - 1)
    fitting = (n for n in range(most, 0, -1) if memory_bytes(training, channels, n) <= machine_memory_bytes() / 4)
    return next(fitting, "thread")


class Handshake(Record):
    """What a site tells the coordinator before a training: nothing that depends on a patient.

    `agreement` and `local` are digests of the site's own copy of the plan; all are empty if it cannot take part.
    """

    site: str
    version: str = __version__
    agreement: str = ""
    local: str = ""
    holds_out: bool = False


class SiteNode(Record):
    """Where a site on a machine of its own finds what it needs.

    `work` holds its prepared data, `plan` is the plan that it agreed to, and `memory` the folder for what it keeps of
    runs: MEMORY/<run>/{plan.json, fold_<k>/{site.log, memory/, releases/, split.json}}. `public` holds the public
    images, if the algorithm labels them.
    """

    site: str
    work: Path
    plan: Path
    memory: Path
    device: str = "auto"
    public: Path | None = None

    def resolved(self) -> SiteNode:
        """The same places, wherever a process that is started with them works."""
        places = {name: value.resolve() for name, value in self if isinstance(value, Path)}
        return self.model_copy(update=places)

    def check(self) -> None:
        """`ValidationErrors` if the site could take part in no training by its plan."""
        plan = self._agreed()
        raise_if_any(str(self.plan), self._problems(plan))
        open_data(self.work, self.site, plan)
        open_public_of(plan, self.public, self.work)

    def handshake(self, name: str) -> Handshake:
        """Whether the site can take part in the training of this name; why not is in its own log."""
        try:
            plan = self._agreed()
            raise_if_any(name, self._problems(plan))
            fold, _ = self._place(name)
            _, partition = self._data(plan, name)
            open_public_of(plan, self.public, self.work)
        except Exception as error:  # only that it cannot take part may be said
            self._log(error)
            return Handshake(site=self.site)
        return Handshake(
            site=self.site, agreement=plan.agreement.digest(), local=plan.local.digest(),
            holds_out=fold != ALL and bool(partition.validation),
        )  # fmt: skip

    def answer(self, data: bytes, agreement: str) -> bytes:
        """The site's answer to a request under this agreement; only a code if its own plan has another."""
        request = Request("", 0, "")
        try:
            message = from_bytes(data)
            request = message if isinstance(message, Request) else request
            plan = self._agreed()
            _refuse_other_agreement(agreement, plan)
            site, partition = self._open(plan, request.run)
            site.compute = replace(site.compute, loader=_loader(workers_for(plan, site.compute.device)))
        except Exception as error:  # whatever went wrong inside, only a code may leave the site
            self._log(error)
            return to_bytes(Failure(request.run, request.round, self.site, "failed"))
        response = site.answer(data)
        if (site.folder / "releases").is_dir():  # it has responded in this training: its split is fixed from now on
            save_split(site.folder, partition)
        return response

    def _open(self, plan: Plan, name: str) -> tuple[Site, Split]:
        from autofed.federation.site import Site, SiteData, SiteIdentity, SiteStorage
        from autofed.training.devices import pick_device
        from autofed.training.fit import Compute

        fold, folder = self._place(name)
        store, partition = self._data(plan, name)
        site = Site(
            SiteIdentity(self.site, name, stream_name(self.site, fold)),
            plan,
            SiteData(
                store.only(partition.train),
                store.only(partition.validation),
                open_public_of(plan, self.public, self.work),
            ),
            SiteStorage(folder, {self.site: ledger_path(self.work, self.site)}),
            Compute(pick_device(self.device)),
        )  # fmt: skip
        if site.public is not None:  # then its own part of the plan may be another than the run's
            plan.save(folder.parent / "plan.json")
        return site, partition

    def _agreed(self) -> Plan:
        plan = plans.load(self.plan)
        if self.site not in plan.agreement.patients:
            sites = ", ".join(plan.agreement.patients)
            raise ValidationErrors(
                str(self.plan), [f"{self.site} is not among the sites of the plan, which are {sites}"]
            )
        return plan

    def _problems(self, plan: Plan) -> list[str]:
        """Whether the guarantee of the site's own plan holds, and what that lacks for its algorithm, as problems."""
        from autofed import algorithms

        algorithm = algorithms.make(plan.agreement.algorithm)
        problems = guarantee.problems(plan, {self.site: plan.steps_at(self.site)})
        return [*problems, *algorithm.plan_problems(plan)]

    def _data(self, plan: Plan, name: str) -> tuple[Store, Split]:
        fold, folder = self._place(name)
        store = open_data(self.work, self.site, plan)
        partition = split_patients(self.work, self.site, plan, store, fold)
        raise_if_any(name, split_problems(self.site, fold, partition, folder))
        return store, partition

    def _place(self, name: str) -> tuple[str, Path]:
        """The fold, and the site's own folder for it. The name came from outside, so it may not be a path."""
        match = _REQUEST_NAME.fullmatch(name)
        if not match:
            raise ValidationErrors("a request", [f"found a run called {name!r}; expected 32 hexadecimal digits"])
        run, fold = match[1], match[2] or ALL
        return fold, self.memory / run / f"fold_{fold}"

    def _log(self, error: Exception) -> None:
        """For the site alone: MEMORY/site.log, and the terminal of whoever started this process."""
        handlers: list[logging.Handler] = [logging.StreamHandler()]
        try:
            self.memory.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(self.memory / "site.log"))
        except OSError:
            pass  # a full disk takes no log
        record = logging.LogRecord("site", logging.ERROR, __file__, 0, "%s: %s", (self.site, error), None)
        record.exc_info = (type(error), error, error.__traceback__)
        for handler in handlers:
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
            handler.emit(record)
            handler.close()


@cache
def _loader(workers: Workers) -> PatchLoader:
    """One for all requests: its processes take seconds to start. It ends with this process."""
    return PatchLoader(workers)


def _refuse_other_agreement(agreement: str, plan: Plan) -> None:
    own = plan.agreement.digest()
    if agreement != own:
        raise ValidationErrors(
            "a request", [f"it is under the agreement {agreement[:12]}, the site's own plan has {own[:12]}"]
        )


def _sides(partition: Split) -> dict[str, list[str]]:
    return {"train": list(partition.train), "validation": list(partition.validation)}

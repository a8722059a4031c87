"""A run on disk: its plan, its identity, its folds, and the models that can be taken from it.

RUN/{plan.json, options.json, run.json, train.log,
fold_<k>/{metrics.jsonl, round_<r>/, best.safetensors, validation.json},
sites/<site>/{plan.json, fold_<k>/{site.log, memory/, own/, releases/, validation.json}}}; the fold "all" holds nobody
out, a site has a plan.json if its network is not the run's, and options.json is there if `autofed run` began it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from pydantic import Field

from autofed import plans
from autofed.algorithms import PSEUDO_LABELS
from autofed.data.splits import ALL
from autofed.errors import ValidationErrors, raise_if_any
from autofed.federation import checkpoints, metrics
from autofed.federation.client import SITE_ONLY
from autofed.files import Record, is_part, read_json
from autofed.inference.postprocessing import Postprocessing
from autofed.inference.predictor import Member
from autofed.messages import Arrays, load_groups, read_header, save_groups
from autofed.plans import Plan
from autofed.preprocessing import LabelMaps

GLOBAL, STUDENT = "global", "student"
"""The common model, and that trained on agreed labels at the coordinator; others are of the site of that name."""

VALIDATION = "validation.json"
"""In a fold's folder: the scores of whole held-out cases, by site and structure."""

FEWEST = 0.5
"""Of fewer cases than this no mean is told: noise may leave next to nothing of their number."""

_START = "start.safetensors"
_LEDGERS = "ledgers"
OPTIONS = "options.json"
"""What `autofed run` was asked for."""

_BEGINNING = ("plan.json", OPTIONS, _START, _LEDGERS)


class RunIdentity(Record):
    """Names a run: `id` goes into every request, so that a site knows a question it has answered before.

    A `simulation` charges ledgers of its own and leaves those of the sites alone. `public` is the folder of the public
    images, if the sites label any.
    """

    id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    sites: tuple[str, ...]
    simulation: bool = False
    public: str = ""


class Run:
    """The folder of a run."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    def fold_folder(self, fold: str = ALL) -> Path:
        """Where the states and the metrics of a fold are."""
        return self.folder / f"fold_{fold}"

    def site_folder(self, site: str, fold: str = ALL) -> Path:
        """What belongs to a site in a fold of this run."""
        return self.folder / "sites" / site / f"fold_{fold}"

    def student_path(self, fold: str) -> Path:
        """Where the student of a fold is, if there is one."""
        return self.fold_folder(fold) / "student.safetensors"

    def agreed(self, fold: str) -> LabelMaps:
        """The labels of public images that a fold agreed on; none if its sites share weights."""
        folder = self.fold_folder(fold)
        return checkpoints.load(folder, self.finished(fold)).shared.get(PSEUDO_LABELS, {})

    def site_plan(self, site: str) -> Plan:
        """The plan that a site followed: its own copy if it left one, with a network of its own perhaps."""
        path = self.folder / "sites" / site / "plan.json"
        return plans.load(path) if path.is_file() else self.plan()

    @property
    def log_path(self) -> Path:
        """Where the coordinator writes a line a round, for people."""
        return self.folder / "train.log"

    @property
    def ledgers_folder(self) -> Path:
        """Where a simulation keeps the ledgers that stand in for those of the sites."""
        return self.folder / _LEDGERS

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.folder / "run.json").is_file()

    def refuse_foreign(self) -> None:
        """`ValidationErrors` if the folder holds anything but what a run that was cut off at its very beginning may
        leave.
        """
        names = [p.name for p in self.folder.iterdir()] if self.folder.is_dir() else []
        foreign = sorted(name for name in names if name not in _BEGINNING and not is_part(name))
        raise_if_any(str(self.folder), ["it holds no run but other files; give another folder"] if foreign else [])

    def begin(self, plan: Plan, identity: RunIdentity, start: Arrays | None) -> None:
        """Write the plan and the weights to start from, if any were given, then the identity: now it is a run."""
        plan.save(self.folder / "plan.json")
        if start is not None:
            save_groups(self.folder / _START, {"weights": start})
        else:
            (self.folder / _START).unlink(missing_ok=True)
        identity.save(self.folder / "run.json")

    def identity(self) -> RunIdentity:
        """Who this run is; `ValidationErrors` if the folder is no run."""
        if not self.exists:
            raise ValidationErrors(
                str(self.folder), ["this is not a run; make one with `autofed train plan.json WORK -o RUN`"]
            )
        return RunIdentity.load(self.folder / "run.json")

    def plan(self) -> Plan:
        """The plan that the run follows."""
        self.identity()
        return plans.load(self.folder / "plan.json")

    def start(self) -> Arrays | None:
        """The weights that the run was given to start from, if it was."""
        path = self.folder / _START
        return read_file(path) if path.is_file() else None

    def folds(self) -> list[str]:
        """The folds that have finished a round, in order."""
        begun = (p.name.removeprefix("fold_") for p in self.folder.glob("fold_*"))
        return sorted(fold for fold in begun if self.finished(fold))

    def finished(self, fold: str) -> int:
        """How many rounds of a fold are finished."""
        return max(checkpoints.saved_rounds(self.fold_folder(fold)), default=0)

    def models(self) -> list[str]:
        """The models that can be predicted with: "global" and "student" if there are such, and sites with their own."""
        common = any(checkpoints.has_model(self.fold_folder(f), self.finished(f)) for f in self.folds())
        own = {p.parent.parent.name for p in self.folder.glob("sites/*/fold_*/memory") if _own_models(p)}
        taught = any(self.student_path(f).is_file() for f in self.folds())
        return [*([GLOBAL] if common else []), *sorted(own), *([STUDENT] if taught else [])]

    def members(self, model: str | None = None, folds: Sequence[str] = ()) -> list[Member]:
        """The ensemble of a model: of every fold its best round by held-out patients, or else its snapshots.

        Without a name the common model is taken; without folds that on all patients if it was trained, else every one.
        A training that has not come to its end counts only if none has. `ValidationErrors` lists the models and the
        folds that there are.
        """
        plan, model = self.plan(), model or GLOBAL
        models = ", ".join(self.models()) or "none yet: no round has finished"
        problems = [] if model in self.models() else [f"there is no model {model!r}; choose --model from: {models}"]
        there = self.folds()
        problems += [
            f"fold {fold} was not trained; choose --fold from: {', '.join(there) or 'none yet'}"
            for fold in folds
            if fold not in there
        ]
        raise_if_any(str(self.folder), problems)
        return [member for fold in self._predicting_folds(model, folds) for member in self._members(model, fold, plan)]

    def _predicting_folds(self, model: str, folds: Sequence[str]) -> list[str]:
        """The folds that predict: those named, or that on all patients, or every one that has come to its end."""
        there, rounds = self.folds(), self.plan().agreement.training.rounds
        ended = [fold for fold in there if self.finished(fold) == rounds] or there
        if model == STUDENT:
            ended = [fold for fold in ended if self.student_path(fold).is_file()]
        return list(folds) or ([ALL] if ALL in ended else ended)

    def unfinished(self, model: str | None = None, folds: Sequence[str] = ()) -> list[str]:
        """What is missing of the trainings that predict, in words; nothing if all have come to their ends."""
        rounds = self.plan().agreement.training.rounds
        return [
            f"fold {fold} has finished {self.finished(fold)} of {rounds} rounds"
            for fold in self._predicting_folds(model or GLOBAL, folds)
            if self.finished(fold) < rounds
        ]

    def _members(self, model: str, fold: str, plan: Plan) -> list[Member]:
        name = f"{self.folder.name}/{model}" + ("" if fold == ALL else f" fold {fold}")
        if model == STUDENT:
            return [Member(name, plan, partial(read_file, self.student_path(fold)))]
        plan = plan if model == GLOBAL else self.site_plan(model)
        best = checkpoints.best_path(self.fold_folder(fold) if model == GLOBAL else self._memory(model, fold))
        taught = () if GLOBAL in self.models() else plan.agreement.annotated.get(model, ())
        if best.is_file():
            return [
                Member(f"{name} best round {read_header(best)[1]['round']}", plan, partial(read_file, best), taught)
            ]
        readers = self._readers(model, fold)
        rounds = [r for r in plan.agreement.training.snapshots if r in readers] or [max(readers)]
        return [Member(f"{name} round {r}", plan, readers[r], taught) for r in rounds]

    def _readers(self, model: str, fold: str) -> dict[int, Callable[[], Arrays]]:
        """How to read the weights of each round, when they are needed: an ensemble is never in memory as a whole."""
        if model == GLOBAL:
            folder = self.fold_folder(fold)
            return {r: partial(_read_state, folder, r) for r in checkpoints.saved_rounds(folder) if r > 0}
        paths = _own_models(self._memory(model, fold))
        return {int(p.stem.removeprefix("round_")): partial(read_file, p) for p in paths}

    def _memory(self, site: str, fold: str) -> Path:
        """Where a site's models are: apart from what it answered with, if a private training left it one of its own."""
        own = self.site_folder(site, fold) / SITE_ONLY
        return own if own.is_dir() else self.site_folder(site, fold) / "memory"

    def held_out(self, fold: str, site: str | None = None) -> dict[str, float]:
        """Mean Dice of each structure over the held-out cases of all sites, or of one; nothing before they were scored.

        Sites whose scores carry noise may count fewer than one case together, or a sum above their number.
        """
        path = self.fold_folder(fold) / VALIDATION
        sites = read_json(path)["sites"] if path.is_file() else {}
        sites = sites if site is None else {name: rows for name, rows in sites.items() if name == site}
        totals: dict[str, list[float]] = {}
        for rows in sites.values():
            for name, row in rows.items():
                total = totals.setdefault(name, [0.0, 0.0])
                total[0], total[1] = total[0] + row["sums"][0], total[1] + row["cases"][0]
        return {name: min(1.0, dice / cases) for name, (dice, cases) in totals.items() if cases >= FEWEST}

    def left_out(self, fold: str) -> dict[str, list[int]]:
        """The rounds of a fold in which a site's answer did not count, by site."""
        rounds: dict[str, list[int]] = {}
        for line in metrics.read(self.fold_folder(fold)):
            for site in line.get("left_out", {}):
                rounds.setdefault(site, []).append(line["round"])
        return rounds

    @property
    def _postprocessing(self) -> Path:
        return self.folder / "postprocessing.json"

    def postprocessing(self) -> Postprocessing:
        """What is done to every prediction; nothing if no patients were held out to decide it."""
        return Postprocessing.load(self._postprocessing) if self._postprocessing.is_file() else Postprocessing()

    def save_postprocessing(self, postprocessing: Postprocessing) -> None:
        """Write down what is done to every prediction."""
        postprocessing.save(self._postprocessing)


def _own_models(memory: Path) -> list[Path]:
    """The rounds in which a site remembered a model of its own, and not only what helps to train the common one."""
    return [path for path in sorted(memory.glob("round_*.safetensors")) if "weights" in read_header(path)[0]]


def _read_state(folder: Path, round: int) -> Arrays:
    return checkpoints.model_of(checkpoints.load(folder, round))


def read_file(path: Path) -> Arrays:
    """The weights in a safetensors file that a run wrote: the moving average of them if it has one."""
    groups, _ = load_groups(path)
    if "weights" not in groups:
        raise ValidationErrors(str(path), ["there are no weights in this file"])
    return groups.get("mean") or groups["weights"]


def read_weights(source: Path) -> Arrays:
    """Weights to start from: of a run's training on all patients, or of a safetensors file that a run wrote.

    `ValidationErrors` if a run has no such training: then one of its files has to be named.
    """
    source = Path(source)
    if source.is_file():
        return read_file(source)
    run = Run(source)
    run.identity()
    if ALL not in run.folds() or GLOBAL not in run.models():
        example = "a file in it, such as fold_0/best.safetensors or sites/SITE/fold_all/memory/round_00001.safetensors"
        raise ValidationErrors(
            str(source), [f"the run has no common model that was trained on all patients; name {example}"]
        )
    return run.members(folds=[ALL])[-1].read()

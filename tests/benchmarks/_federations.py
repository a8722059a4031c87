"""Runs on real federations: their plans, claims so that several processes share the work, training, and scores.

OUT/<federation>/{plan.json, work/, runs/<name>/{lock, run/, result.json}}. A run belongs to the process that holds its
lock, which the system lets go when that process ends, however it ends. What was interrupted goes on; result.json is
written last and whole. Linux and macOS only (file locks).

Each site holds out a fifth of its patients (fold 0). Nothing is chosen by their scores, since they are what is
reported: no round is validated, and the model is the last round's.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from autofed import algorithms, api, plans
from autofed.data import CaseFiles, Dataset, find_images, open_dataset
from autofed.data.splits import ALL, split
from autofed.errors import ValidationErrors, raise_if_any
from autofed.federation import client, metrics, rounds
from autofed.federation.run_folder import GLOBAL, STUDENT, Run
from autofed.federation.transports.in_process import InProcess
from autofed.files import read_json, write_json
from autofed.inference.predictor import Predictor
from autofed.inference.scores import find_references, score_case
from autofed.preprocessing import open_store
from autofed.training.devices import pick_device

GALLERY = Path(__file__).resolve().parents[2] / "plans"
HELD_OUT = "0"
"""The fold: which fifth of a site's patients is held out."""

RESAMPLES = 10_000
FEWEST = 5
"""Cases below which no interval is given."""


def unet(axes: int, features: Sequence[int]) -> dict[str, Any]:
    """A U-Net with kernels of 3 and strides of 2."""
    steps = [[1] * axes, *([[2] * axes] * (len(features) - 1))]
    return {
        "network.features": list(features),
        "network.kernels": [[3] * axes] * len(features),
        "network.strides": steps,
    }


_QUARTER = {"geometry.spacing_mm": [999.0, 4.0, 4.0], "patch_size": [64, 64], **unet(2, (8, 16, 32, 64, 64))}

QUICK: dict[str, dict[str, Any]] = {
    "dermoscopy": {**_QUARTER, "training.rounds": 24, "steps_per_round": 18},
    "hippocampus": {"geometry.spacing_mm": [1.6, 1.6, 1.6], "patch_size": [24, 32, 24],
                    "training.rounds": 20, "steps_per_round": 14},
    "breast-ultrasound": {**_QUARTER, "training.rounds": 40, "steps_per_round": 30},
    "histology": {"patch_size": [64, 64], **unet(2, (8, 16, 32, 64, 64)),
                  "training.rounds": 24, "steps_per_round": 18},
    "kidney-ct-simulated": {"geometry.spacing_mm": [8.0, 5.6, 5.6], "patch_size": [16, 24, 48],
                            **unet(3, (8, 16, 32, 64)), "training.rounds": 20, "steps_per_round": 14},
    "brain-mri": {"geometry.spacing_mm": [4.0, 4.0, 4.0], "patch_size": [32, 40, 32],
                  **unet(3, (8, 16, 32, 64)), "training.rounds": 20, "steps_per_round": 14},
}  # fmt: skip
"""Changes to the gallery's plans for a CPU: about a minute of training on one thread."""

FULL: dict[str, Any] = {
    "training.rounds": 60,
    "steps_per_round": 30,
    "local.training.learning_rate": 0.1,
    "local.training.momentum": 0.9,
}
"""Changes to the gallery's plans for an accelerator: the planned network, and the recipe of short trainings."""


@dataclass(frozen=True)
class Experiment:
    """One training: `settings` are changes to the federation's plan, and `label` names them."""

    federation: str
    algorithm: str = "fedavg"
    seed: int = 0
    uneven: bool = False
    label: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder of the run."""
        parts = (self.algorithm, "uneven" if self.uneven else "even", self.label, str(self.seed))
        return "_".join(part for part in parts if part)


@dataclass
class Watch:
    """What a training did: rounds, and bytes to and from all sites.

    `seconds` are those of the rounds by the clock, `local` those of them in local training; `processor` are the
    processor's, in all.
    """

    seconds: float = 0.0
    local: float = 0.0
    processor: float = 0.0
    rounds: int = 0
    down: int = 0
    up: int = 0


@dataclass(frozen=True)
class Bench:
    """Where the data is, where results go, and how large the runs are."""

    data: Path
    out: Path
    full: bool = False
    device: str = "auto"

    def fold(self, federation: str) -> str:
        """The fold that is trained: nobody can be held out where no site has five patients."""
        return ALL if federation == "brain-mri" else HELD_OUT

    def sites(self, federation: str) -> list[Path]:
        """The folders of the sites."""
        return sorted(p.parent for p in (self.data / federation).glob("sites/*/dataset.json"))

    def plan(self, federation: str) -> plans.Plan:
        """The plan that all runs of a federation share; ends if OUT holds results of another."""
        made = plans.load(GALLERY / federation / ("plan.json" if self.full else "plan-cpu.json"))
        changes = self.changes(federation)
        made = made.change(
            {"keep_momentum": False, **changes, "training.snapshots": [changes["training.rounds"]], "validate_every": 0}
        )
        path = self.out / federation / "plan.json"
        if not path.is_file():
            made.save(path)
        elif plans.load(path) != made:
            raise SystemExit(f"{path} is another plan than this script's; name another -o")
        return made

    def changes(self, federation: str) -> Mapping[str, Any]:
        """What this machine's plan changes in the gallery's."""
        return FULL if self.full else QUICK[federation]

    def prepare(self, federation: str) -> plans.Plan:
        """The plan, and the sites' data prepared for it, by one process while others wait."""
        made, folder = self.plan(federation), self.out / federation
        with locked(folder / "prepare.lock", wait=True):
            api.preprocess(made, self.sites(federation), folder / "work", processes=2)
        return made

    def folder(self, experiment: Experiment) -> Path:
        """Where a run and its result are."""
        return self.out / experiment.federation / "runs" / experiment.name

    def result(self, experiment: Experiment) -> Result | None:
        """What is known of a run that is finished."""
        path = self.folder(experiment) / "result.json"
        return Result(json.loads(path.read_text())) if path.is_file() else None

    def results(self, experiments: Iterable[Experiment]) -> list[Result]:
        """Those of some runs that are finished, in their order."""
        return [found for experiment in experiments if (found := self.result(experiment))]

    def perform(self, experiments: Iterable[Experiment]) -> int:
        """Run what is neither finished nor another process's work; gives how many failed."""
        failed = 0
        for experiment in experiments:
            folder = self.folder(experiment)
            if experiment.algorithm not in algorithms.names():
                say(f"{experiment.federation} {experiment.name}: there is no such algorithm yet")
                continue
            with locked(folder / "lock") as mine:
                if not mine or (folder / "result.json").is_file():
                    continue
                try:
                    self._perform(experiment, folder)
                except ValidationErrors as error:
                    failed += 1
                    say(f"{experiment.federation} {experiment.name} failed: {error}")
        return failed

    def _perform(self, experiment: Experiment, folder: Path) -> None:
        begin = time.monotonic()
        made = self.plan_of(experiment)
        work = self.out / experiment.federation / "work"
        with watching() as watch:
            run = api.train(made, work, folder / "run", folds=[self.fold(experiment.federation)],
                              init=self.start(experiment, made),
                              device=self.device, simulation=True,
                              resume=(folder / "run" / "run.json").is_file(), **self.options(experiment))  # fmt: skip
        complete(run, self.fold(experiment.federation))
        trained = time.monotonic()
        scored = self._score(experiment, run, made)
        seconds = {"training": round(trained - begin, 1), "scoring": round(time.monotonic() - trained, 1)}
        write_json(folder / "result.json", {
            "experiment": asdict(experiment), "about": about(made), "seconds": seconds, "watched": asdict(watch),
            **scored,
        })  # fmt: skip
        said = f", Dice {Result(scored).dice('test'):.4f}" if scored["test"] else ""
        say(f"{experiment.federation} {experiment.name}: {seconds}{said}")

    def start(self, experiment: Experiment, made: plans.Plan) -> Path | None:
        """A file of weights to start a new run from; none."""
        return None

    def options(self, experiment: Experiment) -> dict[str, Any]:
        """What else the training of an experiment is told: where the public images are, if its sites label them."""
        labels = algorithms.find(experiment.algorithm).shares_pseudo_labels
        return {"public": self.data / experiment.federation / "public"} if labels else {}

    def plan_of(self, experiment: Experiment) -> plans.Plan:
        """The federation's plan with what is the experiment's own."""
        made = self.prepare(experiment.federation)
        changes = {"algorithm.name": experiment.algorithm, "training.seed": experiment.seed, **experiment.settings}
        if experiment.uneven:
            changes["training.steps_at"] = self._epochs(made, self.out / experiment.federation / "work")
        return made.change(changes)

    def _epochs(self, made: plans.Plan, work: Path) -> dict[str, int]:
        """Steps by the sites' patients in training, as many in all as when they are even."""
        patients = {
            site: len(split(open_store(work, site, made.local).patients, HELD_OUT, work / site, private=False).train)
            for site in made.agreement.patients
        }
        return shares(patients, len(patients) * made.local.training.steps_per_round)

    def _score(self, experiment: Experiment, run: Run, made: plans.Plan) -> dict[str, Any]:
        """Every model on the test set, and every site's own (or else the common one) on what that site held out."""
        device, fold = pick_device(self.device), self.fold(experiment.federation)
        models = {
            model: Predictor(run.members(model, [fold])[-1:], device=device, mirroring=False) for model in run.models()
        }
        test = test_set(self.data / experiment.federation / "test", made)
        held = {}
        for folder in self.sites(experiment.federation):
            dataset = open_dataset(folder)
            patients = read_json(run.site_folder(dataset.name, fold) / "split.json")["validation"]
            cases = [c for c, files in dataset.cases.items() if files.label and dataset.patient(c) in patients]
            model = dataset.name if dataset.name in models else GLOBAL
            held[dataset.name] = score(models[model], dataset, cases)
        return {"test": {model: score(found, test, test.cases) for model, found in models.items()}, "held_out": held}


class Result:
    """The scores of a finished run: [Dice, HD95] by case, of each model on the test set, of each site's held-out."""

    def __init__(self, content: Mapping[str, Any]):
        self.content = content

    @property
    def seed(self) -> int:
        """Of the training."""
        return self.content["experiment"]["seed"]

    def test_cases(self) -> dict[str, float]:
        """Dice by test case, the mean over the models."""
        models = [self.cases("test", model) for model, _ in self.models("test")]
        return {case: float(np.mean([m[case] for m in models if case in m])) for case in models[0]}

    def cases(self, where: str, which: str) -> dict[str, float]:
        """Dice by case, of a model on "test" or a site on "held_out"; a site without its own model has the common."""
        found = self.content[where]
        return {c: s[0] for c, s in found[which if which in found else GLOBAL].items() if s[0] is not None}

    def each(self, where: str, what: int = 0) -> dict[str, float]:
        """Mean over cases of Dice (0) or HD95 (1), for every model on "test", for every site on "held_out"."""
        found = {which: [s[what] for s in cases.values() if s[what] is not None] for which, cases in self.models(where)}
        return {which: float(np.mean(values)) for which, values in found.items() if values}

    def models(self, where: str) -> list[tuple[str, Mapping[str, Any]]]:
        """On "test" the sites' own models, or else the common one; on "held_out" the sites."""
        found = self.content[where]
        return [(w, cases) for w, cases in found.items() if w not in (GLOBAL, STUDENT) or len(found) == 1]

    def dice(self, where: str) -> float:
        """Mean over the models, or over the sites."""
        return float(np.mean(list(self.each(where).values())))

    def hd95(self, where: str) -> float:
        """Mean over the models, or over the sites, of the cases that have a distance."""
        found = list(self.each(where, 1).values())
        return float(np.mean(found)) if found else float("nan")

    def without_distance(self) -> float:
        """The share of test cases with a Dice and no HD95: the structure is in only one of the two maps."""
        rows = [s for _, cases in self.models("test") for s in cases.values() if s[0] is not None]
        return sum(s[1] is None for s in rows) / len(rows)

    @property
    def student(self) -> float | None:
        """Dice on the test set of a student that was trained on agreed labels alone."""
        rows = self.content["test"].get(STUDENT, {}).values()
        return float(np.mean([s[0] for s in rows if s[0] is not None])) if rows else None

    @property
    def common(self) -> float | None:
        """Dice of the common model on the test set, where the sites have their own beside it."""
        rows = self.content["test"].get(GLOBAL, {}).values()
        return (
            float(np.mean([s[0] for s in rows if s[0] is not None])) if len(self.content["test"]) > 1 and rows else None
        )

    @property
    def overhead(self) -> float:
        """The share of the rounds that is no local training."""
        return 1 - self.content["watched"]["local"] / self.content["watched"]["seconds"]


# --- one run ---------------------------------------------------------------------------------------------------------


def shares(weights: Mapping[str, int], total: int) -> dict[str, int]:
    """`total` shared out by weights in whole numbers, the largest remainders rounded up, nobody left with none."""
    exact = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    found = {name: max(1, int(value)) for name, value in exact.items()}
    while (rest := total - sum(found.values())) > 0:
        found[max(exact, key=lambda n: exact[n] - found[n])] += 1
    found[max(exact, key=lambda n: exact[n])] += min(rest, 0)  # of those who would have had none
    return found


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process now holds the lock; with `wait` it does, sooner or later."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def watching() -> Iterator[Watch]:
    """Count what a training in this block does: time by the clock, and the bytes that the transport carries."""
    watch, fit, run, carry = Watch(), client.fit, rounds.run_rounds, InProcess.__call__

    def timed(work: Callable[..., Any], name: str) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                setattr(watch, name, getattr(watch, name) + time.perf_counter() - begin)

        return inner

    def counted(self: InProcess, requests: Mapping[str, bytes], *args: Any, **kwargs: Any) -> Any:
        found = carry(self, requests, *args, **kwargs)
        watch.rounds += 1
        watch.down += sum(map(len, requests.values()))
        watch.up += sum(map(len, found.values()))
        return found

    with (
        patch.object(client, "fit", timed(fit, "local")),
        patch.object(rounds, "run", timed(run, "seconds")),
        patch.object(InProcess, "__call__", counted),
    ):
        begin = time.process_time()
        yield watch
        watch.processor = time.process_time() - begin


def complete(run: Run, fold: str) -> None:
    """`ValidationErrors` if a site was left out of a round: such a run says nothing of its algorithm."""
    lines = metrics.read(run.fold_folder(fold))
    raise_if_any(
        str(run.folder), [f"round {line['round']}: {line['left_out']}" for line in lines if line.get("left_out")]
    )


def test_set(folder: Path, made: plans.Plan) -> Dataset:
    """The test cases with their labels, as if a site held them."""
    agreement, labels = made.agreement, find_references(folder / "labelsTs")[0]
    found = find_images(folder / "imagesTs", len(agreement.channels))
    cases = {case: CaseFiles(files.images, labels[case]) for case, files in found.items()}
    return Dataset(folder, agreement.channels, agreement.labels, cases)


def score(predictor: Predictor, dataset: Dataset, cases: Iterable[str]) -> dict[str, list[float | None]]:
    """Dice and HD95 of each case, the mean over its structures."""
    found = {}
    for name in cases:
        case = dataset.read(name)
        labels = predictor.predict(case).labels
        means = score_case(labels, case.label, dataset.labels, case.spacing_mm, name).mean
        found[name] = [means.dice, means.hd95_mm]
    return found


def about(made: plans.Plan) -> dict[str, Any]:
    """Machine, date, version."""
    head = ["git", "-C", str(GALLERY), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": str(date.today()), "machine": platform.machine(), "threads": torch.get_num_threads(),
        "precision": made.local.training.precision, "commit": commit,
    }  # fmt: skip


def say(text: str) -> None:
    """To the log, not among the tables."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


# --- numbers and tables ----------------------------------------------------------------------------------------------


def paired(ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]]) -> tuple[float, ...]:
    """Mean difference over cases and seeds, with its 95 % bootstrap interval, or alone if there are too few cases.

    `ours` and `theirs` are Dice by case, seed by seed. Cases and seeds are both drawn anew (Owen, "The pigeonhole
    bootstrap", Ann Appl Stat 1:386, 2007), so that the interval is for other patients and other trainings.
    """
    cases = sorted(set.intersection(*(set(run) for run in (*ours, *theirs))))
    if not cases:
        return ()
    apart = np.array([[a[c] - b[c] for c in cases] for a, b in zip(ours, theirs, strict=True)])
    if len(cases) < FEWEST:
        return (float(apart.mean()),)
    generator = np.random.default_rng(0)
    seeds = generator.multinomial(len(apart), np.full(len(apart), 1 / len(apart)), RESAMPLES) / len(apart)
    drawn = generator.multinomial(len(cases), np.full(len(cases), 1 / len(cases)), RESAMPLES) / len(cases)
    low, high = np.percentile(np.einsum("rs,sc,rc->r", seeds, apart, drawn, optimize=True), (2.5, 97.5))
    return float(apart.mean()), float(low), float(high)


def apart(ours: Sequence[Result], theirs: Sequence[Result]) -> tuple[float, ...]:
    """`paired` on the test set, over the seeds that both have."""
    by_seed = [{result.seed: result.test_cases() for result in results} for results in (ours, theirs)]
    seeds = sorted(set(by_seed[0]) & set(by_seed[1]))
    return paired(*([found[seed] for seed in seeds] for found in by_seed)) if seeds else ()


def points(difference: tuple[float, ...]) -> str:
    """A difference in points of Dice, with its interval if it has one."""
    if not difference:
        return "-"
    mean, *ends = (f"{100 * value:+.1f}" for value in difference)
    return f"{mean} ({' to '.join(ends)})" if ends else f"{mean} (few)"


def spread(values: Sequence[float]) -> str:
    """Mean and, of several seeds, their standard deviation."""
    mean = f"{np.mean(values):.4f}"
    return f"{mean} ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else mean


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def described(made: plans.Plan, results: Sequence[Result]) -> str:
    """What all runs of a federation share, as a sentence."""
    training, length = made.local.training, made.agreement.training.rounds
    every, network = training.steps_per_round, made.local.network
    machines = {
        "{machine}, {threads} threads, {precision}; {date}; {commit}".format(**r.content["about"]) for r in results
    }
    return (
        f"{network.parameters / 1e6:.2f} million parameters, patch {training.patch_size}, spacing "
        f"{made.local.geometry.spacing_mm[-made.local.axes :]}, batch {training.batch_size}; {length} rounds of "
        f"{every} steps at each of {len(made.agreement.patients)} sites; {' / '.join(sorted(machines))}.\n"
    )


def parser(text: str | None, federations: Iterable[str]) -> argparse.ArgumentParser:
    """What all these scripts are told."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("data", type=Path)
    made.add_argument("-o", "--output", type=Path, required=True)
    made.add_argument("--federation", action="append", choices=list(federations))
    made.add_argument("--seed", action="append", type=int, help="a seed; may be repeated")
    made.add_argument("--device", default="auto")
    made.add_argument("--table", action="store_true", help="run nothing, print what is known")
    size = made.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="about 75 s of training a run on one thread (the default)")
    size.add_argument("--full", action="store_true", help="the planned networks, for an accelerator")
    return made


def bench(args: argparse.Namespace) -> Bench:
    """What the arguments say."""
    return Bench(
        args.data.resolve(), args.output.resolve() / ("full" if args.full else "quick"), args.full, args.device
    )

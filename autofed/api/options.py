"""What the verbs may be asked for, beside what they work on: a record for each verb, whose fields are its keywords.

Who calls a verb writes keywords, `plan(sites, hours=1, epsilon=8)`; within, they travel as one frozen record. The typed
dictionaries tell editors and type checkers the same names and types (tests/test_options.py holds them together).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from difflib import get_close_matches
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypedDict, TypeVar

from autofed.data.splits import ALL
from autofed.files import PathLike
from autofed.parallel import Progress, silent
from autofed.plans import Plan, Speed

if TYPE_CHECKING:
    from autofed.training.batches import Workers

P = ParamSpec("P")
R = TypeVar("R")

Say = Callable[[str], None]
"""Told sentences while a verb works."""


def quiet(_sentence: str) -> None:
    """For those who do not want to be told any."""


@dataclass(frozen=True)
class NoisedFingerprintOptions:
    """How a site's fingerprint is counted under noise."""

    work: PathLike | None
    """WORK, where the prepared data will be: the site's ledger is in `WORK/<site>`."""
    epsilon: float | None
    """That of the plan to come, to which the noise belongs."""
    delta: float | None = None
    """That of the plan to come; by default the smaller of 1e-5 and a tenth of one over the site's patients."""
    simulation: bool = False
    """Whether its ledger counts for nobody."""
    speed: bool = False
    """Whether the speed of this machine is measured and handed over, too."""
    device: str = "auto"
    """Where that is measured: auto (the fastest there is), cpu, cuda or mps."""
    processes: int = 1
    """So many read the cases."""
    progress: Progress = silent
    """Told what is being done, how many are done, and how many there are."""


class NoisedFingerprintKeywords(TypedDict, total=False):
    """The fields of `NoisedFingerprintOptions`."""

    work: PathLike | None
    epsilon: float | None
    delta: float | None
    simulation: bool
    speed: bool
    device: str
    processes: int
    progress: Progress


@dataclass(frozen=True)
class PlanOptions:
    """What a plan may cost, what it shall promise, and what is decided by hand."""

    hours: float | None = None
    """Training time from start to end; by default 1 on a CPU and nnU-Net's full training elsewhere."""
    memory_gb: float | None = None
    """Memory of the device in GB; by default what the preset was made for."""
    device: str = "auto"
    """What trains: auto (the fastest here), cpu, cuda or mps. One that is not here is planned for without measuring."""
    speed: PathLike | Speed | None = None
    """How fast the device is, instead of measuring it here: a record, or a JSON file that holds one."""
    algorithm: str | None = None
    """How the sites learn together; by default the planner chooses."""
    configuration: str = "auto"
    """On which grid to learn: auto, 2d, 3d_fullres or 3d_lowres."""
    preset: str | None = None
    """Which network; by default that of the algorithm (dcfed has its own), or else nnU-Net's plain one."""
    like: PathLike | None = None
    """A run or its plan, whose weights shall go on being trained: grid, network and recipe are then those of it."""
    settings: Mapping[str, Any] | None = None
    """Fields of the plan, by their paths or unique endings, and the values that they are set to by hand."""
    epsilon: float | None = None
    """The promise to every patient: network, steps and privacy parameters are planned for it."""
    delta: float | None = None
    """How likely it may be broken; by default the smaller of 1e-5 and a tenth of one over the largest site's patients.
    """
    even_if_hopeless: bool = False
    """Whether to plan also where hardly anything would be learned under the promise."""
    private_census: bool = False
    """Whether the folders are counted under noise, charged to the sites' ledgers in `work`."""
    work: PathLike | None = None
    """With `private_census`: WORK, where the prepared data will be."""
    simulation: bool = False
    """With `private_census`: whether these ledgers count for nobody."""
    prior: PathLike | None = None
    """A plan for data of the same kind, for what noised fingerprints do not tell."""
    processes: int = 1
    """So many read the cases."""
    progress: Progress = silent
    """Told what is being done, how many are done, and how many there are."""

    @property
    def by_hand(self) -> Mapping[str, Any]:
        """The settings; empty if there are none."""
        return self.settings or {}


class PlanKeywords(TypedDict, total=False):
    """The fields of `PlanOptions`."""

    hours: float | None
    memory_gb: float | None
    device: str
    speed: PathLike | Speed | None
    algorithm: str | None
    configuration: str
    preset: str | None
    like: PathLike | None
    settings: Mapping[str, Any] | None
    epsilon: float | None
    delta: float | None
    even_if_hopeless: bool
    private_census: bool
    work: PathLike | None
    simulation: bool
    prior: PathLike | None
    processes: int
    progress: Progress


@dataclass(frozen=True)
class TrainOptions:
    """How a training is run: with what, for how long, on whom, and where."""

    algorithm: str | None = None
    """Instead of the plan's."""
    public: PathLike | None = None
    """A folder of public images, for an algorithm that labels them; the plan agrees on them by digest."""
    site_plans: Mapping[str, PathLike | Plan] | None = None
    """By site: a plan with a network and grid of its own, for such an algorithm."""
    rounds: int | None = None
    """Instead of the plan's; together with `resume`, to go on for longer."""
    folds: Sequence[str] = (ALL,)
    """"all" (nobody is held out), numbers of parts of the patients that each site holds out, or "cv" for all five."""
    init: PathLike | None = None
    """A run or a file of weights to start from."""
    resume: bool = False
    """Whether to go on after the last finished round, to the weights of an unbroken run."""
    device: str = "auto"
    """Where to compute: auto (the fastest there is), cpu, cuda or mps."""
    workers: Workers | None = None
    """Who makes the patches: 0 for none beside the training, "thread", or so many processes; by default a thread on a
    CPU and processes elsewhere."""
    simulation: bool = False
    """Whether ledgers of this run are charged, and the sites' own left alone."""
    connection: str | None = None
    """The name of a SuperLink in Flower's configuration, behind which the sites are."""
    progress: Progress = silent
    """Told what is being done, how many are done, and how many there are."""
    say: Say = quiet
    """Told what the SuperLink says."""


class TrainKeywords(TypedDict, total=False):
    """The fields of `TrainOptions`."""

    algorithm: str | None
    public: PathLike | None
    site_plans: Mapping[str, PathLike | Plan] | None
    rounds: int | None
    folds: Sequence[str]
    init: PathLike | None
    resume: bool
    device: str
    workers: Workers | None
    simulation: bool
    connection: str | None
    progress: Progress
    say: Say


@dataclass(frozen=True)
class PredictOptions:
    """Which ensemble predicts, how, and what is written."""

    spacing_mm: Sequence[float] | None = None
    """Of an array: (z, y, x) in mm."""
    model: str | None = None
    """"global" (the default), a site with a model of its own, or "student"."""
    folds: Sequence[str] = ()
    """Only these; by default the training on all patients, or else every fold that was trained."""
    postprocessing: bool = True
    """Whether to do what the runs found to help on held-out cases."""
    mirroring: bool = True
    """Whether to average mirrored views."""
    save_probabilities: bool = False
    """Whether to keep the probabilities of all structures, too."""
    device: str = "auto"
    """Where to compute: auto (the fastest there is), cpu, cuda or mps."""
    progress: Progress = silent
    """Told what is being done, how many are done, and how many there are."""
    say: Say = quiet
    """Told which weights predict, and how many cases were predicted before."""


class PredictKeywords(TypedDict, total=False):
    """The fields of `PredictOptions`."""

    spacing_mm: Sequence[float] | None
    model: str | None
    folds: Sequence[str]
    postprocessing: bool
    mirroring: bool
    save_probabilities: bool
    device: str
    progress: Progress
    say: Say


@dataclass(frozen=True)
class RunOptions:
    """What the plan of a run may cost and shall promise, and how it is trained."""

    hours: float | None = None
    """Training time from start to end; by default 1 on a CPU and nnU-Net's full training elsewhere."""
    memory_gb: float | None = None
    """Memory of the device in GB; by default what the preset was made for."""
    device: str = "auto"
    """Where to compute: auto (the fastest there is), cpu, cuda or mps."""
    algorithm: str | None = None
    """How the sites learn together; by default the planner chooses."""
    configuration: str = "auto"
    """On which grid to learn: auto, 2d, 3d_fullres or 3d_lowres."""
    preset: str | None = None
    """Which network; by default that of the algorithm (dcfed has its own), or else nnU-Net's plain one."""
    settings: Mapping[str, Any] | None = None
    """Fields of the plan, by their paths or unique endings, and the values that they are set to by hand."""
    epsilon: float | None = None
    """The promise to every patient: network, steps and privacy parameters are planned for it."""
    delta: float | None = None
    """How likely it may be broken; by default the smaller of 1e-5 and a tenth of one over the largest site's patients.
    """
    even_if_hopeless: bool = False
    """Whether to plan also where hardly anything would be learned under the promise."""
    work: PathLike | None = None
    """WORK, for prepared data and ledgers; by default the folder `work` beside RUN."""
    public: PathLike | None = None
    """A folder of public images, for an algorithm that labels them."""
    folds: Sequence[str] = (ALL,)
    """"all" (nobody is held out), numbers of parts of the patients that each site holds out, or "cv" for all five."""
    simulation: bool = False
    """Whether ledgers of this run are charged, and the sites' own left alone."""
    processes: int = 1
    """So many read and prepare the cases."""
    progress: Progress = silent
    """Told what is being done, how many are done, and how many there are."""
    say: Say = quiet
    """Told where the plan and the prepared data are."""


class RunKeywords(TypedDict, total=False):
    """The fields of `RunOptions`."""

    hours: float | None
    memory_gb: float | None
    device: str
    algorithm: str | None
    configuration: str
    preset: str | None
    settings: Mapping[str, Any] | None
    epsilon: float | None
    delta: float | None
    even_if_hopeless: bool
    work: PathLike | None
    public: PathLike | None
    folds: Sequence[str]
    simulation: bool
    processes: int
    progress: Progress
    say: Say


PLANNED = (
    "hours", "memory_gb", "device", "algorithm", "configuration", "preset", "settings", "epsilon", "delta",
    "even_if_hopeless",
)  # fmt: skip
"""The options of a run that its plan follows from."""


def takes(record: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a function whose further keywords are the fields of a record: it shows them, and refuses all others.

    An unknown or missing keyword is a TypeError, as of any function; it names the keywords that may be meant.
    """
    further = [_parameter(field) for field in fields(record)]
    names = [parameter.name for parameter in further]

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        shown = signature.replace(parameters=[*own, *further])

        @wraps(function)
        def checked(*args: P.args, **keywords: P.kwargs) -> R:
            for name in keywords:
                if name not in shown.parameters:
                    raise TypeError(_unknown(function.__name__, name, names))
            shown.bind(*args, **keywords)
            return function(*args, **keywords)

        checked.__signature__ = shown  # type: ignore[attr-defined]
        return checked

    return decorate


def _parameter(field: Field) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=field.type)


def _unknown(function: str, name: str, names: Sequence[str]) -> str:
    close = get_close_matches(name, names)
    hint = f"did you mean {' or '.join(close)}?" if close else f"its keywords are {', '.join(names)}"
    return f"{function}() got an unexpected keyword argument {name!r}; {hint}"

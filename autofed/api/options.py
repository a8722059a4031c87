"""The options of the API's functions: a record for each function, whose fields are its keyword arguments.

Callers write keywords, `plan(sites, hours=1, epsilon=8)`; inside, they are one frozen record. The typed dictionaries
give editors and type checkers the same names and types (tests/test_options.py compares them).
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
"""Called with each message of a function while it works."""


def quiet(_sentence: str) -> None:
    """Ignore all messages."""


@dataclass(frozen=True)
class PrivateFingerprintOptions:
    """How a site's private fingerprint is made."""

    work: PathLike | None
    """WORK, the folder for preprocessed data: the site's ledger is in `WORK/<site>`."""
    epsilon: float | None
    """The epsilon of the plan that will be made from it; the noise is part of that guarantee."""
    delta: float | None = None
    """The delta of that plan; by default the smaller of 1e-5 and 1/(10 n), n patients at the site."""
    simulation: bool = False
    """Whether its ledger is one for simulations, which protects no real patient."""
    speed: bool = False
    """Whether to measure the speed of this machine too and add it."""
    device: str = "auto"
    """The device whose speed is measured: auto (the fastest there is), cpu, cuda or mps."""
    processes: int = 1
    """How many processes read the cases."""
    progress: Progress = silent
    """Called with the stage, how many items are done, and how many there are."""


class PrivateFingerprintKeywords(TypedDict, total=False):
    """The fields of `PrivateFingerprintOptions`."""

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
    """The budget of a plan, its privacy guarantee, and the fields that are set by hand."""

    hours: float | None = None
    """Training time from start to end; by default 1 on a CPU and nnU-Net's full training elsewhere."""
    memory_gb: float | None = None
    """Memory of the device in GB; by default what the preset was made for."""
    device: str = "auto"
    """What trains: auto (the fastest here), cpu, cuda or mps. The speed of one that is not here is not measured."""
    speed: PathLike | Speed | None = None
    """How fast the device is, instead of measuring it here: a record, or a JSON file that holds one."""
    algorithm: str | None = None
    """How the sites learn together; by default the planner chooses."""
    configuration: str = "auto"
    """On which grid to learn: auto, 2d, 3d_fullres or 3d_lowres."""
    preset: str | None = None
    """Which network; by default that of the algorithm (dcfed has its own), or else nnU-Net's plain one."""
    like: PathLike | None = None
    """A run or its plan, whose weights will be trained further: grid, network and training settings are copied from it.
    """
    settings: Mapping[str, Any] | None = None
    """Fields of the plan, by their paths or unique endings, and the values that they are set to by hand."""
    epsilon: float | None = None
    """The privacy guarantee for every patient: network, steps and privacy parameters are planned for it."""
    delta: float | None = None
    """The delta of the guarantee; by default the smaller of 1e-5 and 1/(10 n), n patients at the largest site."""
    even_if_hopeless: bool = False
    """Whether to make a private plan even if hardly anything would be learned."""
    private_census: bool = False
    """Whether to make private fingerprints of the folders, charged to the sites' ledgers in `work`."""
    work: PathLike | None = None
    """With `private_census`: WORK, the folder for preprocessed data and ledgers."""
    simulation: bool = False
    """With `private_census`: whether these ledgers are for simulations, which protect no real patient."""
    prior: PathLike | None = None
    """A plan for data of the same kind, which completes what private fingerprints leave out."""
    processes: int = 1
    """How many processes read the cases."""
    progress: Progress = silent
    """Called with the stage, how many items are done, and how many there are."""

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
    """How to train: algorithm, rounds, folds, initial weights and device."""

    algorithm: str | None = None
    """Instead of the plan's."""
    public: PathLike | None = None
    """A folder of public images, for an algorithm that labels them; the plan holds their digests."""
    site_plans: Mapping[str, PathLike | Plan] | None = None
    """By site: a plan with another network or grid, for an algorithm that labels public images."""
    rounds: int | None = None
    """Instead of the plan's; with `resume`, the total number of rounds that a run is extended to."""
    folds: Sequence[str] = (ALL,)
    """"all" (nobody is held out), "0" to "4" (each site holds out a fifth of its patients), or "cv" for all five."""
    init: PathLike | None = None
    """A run or a file of weights to start from."""
    resume: bool = False
    """Whether to continue after the last finished round; the weights are those of an uninterrupted run."""
    device: str = "auto"
    """Where to compute: auto (the fastest there is), cpu, cuda or mps."""
    workers: Workers | None = None
    """What makes the patches: a number of processes, "thread", or 0 for the training itself; by default a thread on a
    CPU and processes elsewhere."""
    simulation: bool = False
    """Whether to charge ledgers of this run instead of the sites' own."""
    connection: str | None = None
    """The name, in Flower's configuration, of the SuperLink that the sites connect to."""
    progress: Progress = silent
    """Called with the stage, how many items are done, and how many there are."""
    say: Say = quiet
    """Called with each line that the SuperLink reports."""


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
    """The folds that predict; by default the training on all patients, or else every fold that was trained."""
    postprocessing: bool = True
    """Whether to apply the postprocessing that improved held-out cases of the runs."""
    mirroring: bool = True
    """Whether to average predictions of mirrored views (test-time augmentation)."""
    save_probabilities: bool = False
    """Whether to write the probabilities of all structures, too."""
    device: str = "auto"
    """Where to compute: auto (the fastest there is), cpu, cuda or mps."""
    progress: Progress = silent
    """Called with the stage, how many items are done, and how many there are."""
    say: Say = quiet
    """Called with messages: which weights predict, and how many cases were already predicted."""


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
    """The budget and privacy guarantee of the plan of a run, and how it is trained."""

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
    """The privacy guarantee for every patient: network, steps and privacy parameters are planned for it."""
    delta: float | None = None
    """The delta of the guarantee; by default the smaller of 1e-5 and 1/(10 n), n patients at the largest site."""
    even_if_hopeless: bool = False
    """Whether to make a private plan even if hardly anything would be learned."""
    work: PathLike | None = None
    """WORK, the folder for preprocessed data and ledgers; by default the folder `work` beside RUN."""
    public: PathLike | None = None
    """A folder of public images, for an algorithm that labels them."""
    folds: Sequence[str] = (ALL,)
    """"all" (nobody is held out), "0" to "4" (each site holds out a fifth of its patients), or "cv" for all five."""
    simulation: bool = False
    """Whether to charge ledgers of this run instead of the sites' own."""
    processes: int = 1
    """How many processes read and preprocess the cases."""
    progress: Progress = silent
    """Called with the stage, how many items are done, and how many there are."""
    say: Say = quiet
    """Called with a message: where the plan and the preprocessed data are."""


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


PLAN_OPTIONS = (
    "hours", "memory_gb", "device", "algorithm", "configuration", "preset", "settings", "epsilon", "delta",
    "even_if_hopeless",
)  # fmt: skip
"""The options of a run that determine its plan."""


def takes(record: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function whose further keywords are the fields of `record`: they appear in its signature.

    An unknown or missing keyword raises TypeError, as for any function; the message suggests similar keywords.
    """
    options = [_parameter(field) for field in fields(record)]
    names = [parameter.name for parameter in options]

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        full = signature.replace(parameters=[*own, *options])

        @wraps(function)
        def checked(*args: P.args, **keywords: P.kwargs) -> R:
            for name in keywords:
                if name not in full.parameters:
                    raise TypeError(_unknown(function.__name__, name, names))
            full.bind(*args, **keywords)
            return function(*args, **keywords)

        checked.__signature__ = full  # type: ignore[attr-defined]
        return checked

    return decorate


def _parameter(field: Field[Any]) -> inspect.Parameter:
    default = inspect.Parameter.empty if field.default is MISSING else field.default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=field.type)


def _unknown(function: str, name: str, names: Sequence[str]) -> str:
    close = get_close_matches(name, names)
    hint = f"did you mean {' or '.join(close)}?" if close else f"its keywords are {', '.join(names)}"
    return f"{function}() got an unexpected keyword argument {name!r}; {hint}"

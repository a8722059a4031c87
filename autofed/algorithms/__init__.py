"""How sites learn together: one file per algorithm, each a frozen dataclass whose fields are its hyper-parameters.

An algorithm runs in three places: `start` and `merge` at the coordinator, `local` at each site. It knows a site only by
the protocol below, and it never combines what comes from patients itself: it calls the `average` it is handed.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from autofed.exchange import Arrays, Groups, Release, Request, ServerState
from autofed.fit import Fitted
from autofed.plans import Algorithm as Choice
from autofed.plans import Plan
from autofed.prepared import Maps
from autofed.problems import Problems, refuse

Average = Callable[[Sequence[Release], str], dict[str, np.ndarray]]
"""The weighted average over sites of one named group of arrays."""


_PARTS = ("start", "local", "merge")


@dataclass(frozen=True)
class Setup:
    """What a run begins with: the plan, and the weights that everyone starts from.

    `grids` are the shapes (Z, Y, X) of the public images, by name, where there are any.
    """

    plan: Plan
    weights: Arrays
    grids: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)


class Act(NamedTuple):
    """The rounds after one, up to the last, over which the learning rate falls from its first value to 0."""

    after: int
    last: int


class SiteView(Protocol):
    """All that an algorithm sees of a site."""

    @property
    def name(self) -> str:
        """The site's name."""
        ...

    @property
    def normalisation(self) -> Collection[str]:
        """The names of the weights that belong to normalisation layers."""
        ...

    def start(self) -> Arrays:
        """Weights of the site's own network to start from, which no other site has."""
        ...

    def fit(
        self,
        weights: Arrays,
        *,
        proximal: float = 0.0,
        correction: Arrays | None = None,
        agreed: Maps | None = None,
        weight: float = 0.0,
        act: Act | None = None,
    ) -> Fitted:
        """Train from `weights` on the site's patients, for as many steps as the plan gives it in a round; once a round.

        `proximal` times the way from `weights` so far and the `correction` are added to every step's gradient, and
        `weight` times that of public images with the labels `agreed` on. The learning rate falls to 0 over the rounds
        of an `act`, or over all rounds; it always does over all of them where a private mechanism takes the steps.
        """
        ...

    def label(self, members: Sequence[Arrays], passes: int = 0) -> dict[str, np.ndarray]:
        """What an ensemble says of every public image (`pseudo.write`).

        Each member looks so many `passes` more, in which channels of its network drop out.
        """
        ...

    def fit_apart(self, agreed: Maps, weight: float, act: Act) -> None:
        """Where a private mechanism trains what `fit` gives: train a better model without it, for the site alone.

        It gives nothing back and raises nothing, so that nothing that leaves can depend on it.
        """
        ...

    def averaged(self, weights: Arrays) -> Arrays:
        """The moving average of the site's own models with these, of this round; with no `training.ema` just these."""
        ...

    def average_reach(self, proximal: float = 0.0) -> float:
        """How far the steps of this round reach (`Fitted.reach`), on average over the plan's sites, by patients."""
        ...

    def memory(self) -> Groups | None:
        """What the site remembered in the last round in which its answer counted, or None before there was one."""
        ...

    def remember(self, groups: Groups) -> None:
        """Keep groups of arrays on the site's own disk for the next round; they never leave."""
        ...


class Algorithm(Protocol):
    """One way of learning together.

    What else it may state, as a class variable: `gathers`, `personal`, `released`, `from_rest`, `labels_public`,
    `answers_as_trained` and `preset`; and methods `plan_problems` and `misfits` (see the functions below).
    """

    def start(self, setup: Setup) -> ServerState:
        """The state before the first round."""
        ...

    def local(self, site: SiteView, request: Request) -> Groups:
        """A site's part of a round: named groups of arrays. They pass the site's mechanism before they leave."""
        ...

    def merge(self, state: ServerState, releases: Sequence[Release], average: Average) -> ServerState:
        """The state after a round, from what the sites released."""
        ...


def names() -> list[str]:
    """The algorithms that exist, by the names of their files."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str, trusted: Collection[str] = ()) -> type:
    """The algorithm class in the file of that name, or in "package.module:Class" if that name is `trusted`.

    A plan comes from elsewhere and must not make a hospital run code, so a name of the second form counts only if the
    person at the keyboard or the site's own policy gave it. `Problems` lists the names that exist.
    """
    module_name, colon, class_name = name.partition(":")
    if name not in trusted if colon else name not in names():
        why = "names code outside autofed, which this site did not allow" if colon else "does not exist"
        raise Problems("the algorithm", [f"the algorithm {name!r} {why}; the algorithms are: {', '.join(names())}"])
    try:
        module = importlib.import_module(module_name if colon else f"{__name__}.{name}")
        found = getattr(module, class_name) if colon else _only_algorithm(module)
    except (ImportError, AttributeError, ValueError) as error:
        raise Problems("the algorithm", [f"{name!r} cannot be loaded ({error})"]) from None
    if not (isinstance(found, type) and is_dataclass(found) and all(hasattr(found, part) for part in _PARTS)):
        raise Problems("the algorithm", [f"{name!r} is not a dataclass with {', '.join(_PARTS)}"])
    return found


def make(choice: Choice, trusted: Collection[str] = ()) -> Algorithm:
    """The algorithm that a plan names, with the plan's settings; `Problems` names every setting it does not have."""
    kind = find(choice.name, trusted)
    known = {f.name for f in fields(kind)}
    refuse(
        "agreement.algorithm.settings",
        [
            f"{choice.name} has no setting {name!r}; it has: {', '.join(sorted(known)) or 'none'}"
            for name in choice.settings
            if name not in known
        ],
    )
    return kind(**choice.settings)


def gathers(algorithm: Algorithm) -> bool:
    """Whether it needs all data in one place; such an algorithm runs only in a simulation."""
    return getattr(algorithm, "gathers", False)


def is_personal(algorithm: Algorithm) -> bool:
    """Whether every site has a model of its own, which is what the patients that it holds out are for."""
    return getattr(algorithm, "personal", False)


def released(algorithm: Algorithm) -> Mapping[str, str]:
    """The groups that every answer must hold, each with the shared group whose names, shapes and dtypes it must have.

    These are what is added to the shared groups, and what travels in the plan's wire precision.
    """
    return getattr(algorithm, "released", {"update": "weights"})


def is_from_rest(algorithm: Algorithm) -> bool:
    """Whether it counts a site's way in a round from rest, so that momentum of earlier rounds would be miscounted."""
    return getattr(algorithm, "from_rest", False)


def is_labelling(algorithm: Algorithm | type) -> bool:
    """Whether labels of public images travel and no weights: then sites may have networks and grids of their own."""
    return getattr(algorithm, "labels_public", False)


def preset(algorithm: Algorithm | type) -> str:
    """The network that it is published with, which a plan takes unless another is asked for."""
    return getattr(algorithm, "preset", "plain")


ANSWERS = "answers"
"""The group of a release with what a site's models say of public images."""

AGREED = "agreed"
"""The group of a state with the labels of public images that sites agreed on."""


def answers_as_trained(algorithm: Algorithm) -> bool:
    """Whether its answers are made by weights of `SiteView.fit` alone, as a private mechanism trained them.

    Only then do they leave a site with such a mechanism: nothing else about them bounds what they tell of a patient.
    """
    return getattr(algorithm, "answers_as_trained", False)


def plan_problems(algorithm: Algorithm, plan: Plan) -> list[str]:
    """What an algorithm needs of a site's plan and does not find there; then there is no training."""
    check = getattr(algorithm, "plan_problems", None)
    return check(plan) if check else []


def misfits(algorithm: Algorithm, arrays: Groups, shared: Groups) -> list[str]:
    """What an algorithm itself finds wrong with a site's answer; such a site is left out of the round."""
    check = getattr(algorithm, "misfits", None)
    return check(arrays, shared) if check else []


NOTES = "notes"
"""The group of a merged state's `kept` with numbers for the line of the round: "name", or "name/site"."""


def site_weights(plan: Plan) -> Mapping[str, float]:
    """Each site's weight in an average, as the plan says and never a message: its number of patients, or its square."""
    power = 2 if plan.agreement.average.weights == "noise" else 1
    return {site: float(patients) ** power for site, patients in plan.agreement.patients.items()}


def _only_algorithm(module: Any) -> type:
    found = [
        v
        for v in vars(module).values()
        if isinstance(v, type) and v.__module__ == module.__name__ and hasattr(v, "local") and hasattr(v, "merge")
    ]
    if len(found) != 1:
        raise AttributeError(f"the file must define one algorithm, it defines {len(found)}")
    return found[0]

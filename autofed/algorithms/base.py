"""The contract of an algorithm: what it is asked for, what it states of itself, and all that it sees of a site.

Nothing here loads torch, so that a planner, too, can ask an algorithm about itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from inspect import get_annotations
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np

from autofed.messages import ArrayGroups, Arrays, Request, Response, ServerState
from autofed.plans import Plan

if TYPE_CHECKING:
    from autofed.preprocessing import LabelMaps
    from autofed.training.fit import LocalResult

AverageGroup = Callable[[Sequence[Response], str], dict[str, np.ndarray]]
"""The weighted average over sites of one named group of arrays."""

PREDICTIONS = "answers"
"""The group of a release with what a site's models say of public images."""

PSEUDO_LABELS = "agreed"
"""The group of a state with the labels of public images that sites agreed on."""

NOTES = "notes"
"""The group of a merged state's `server_only` with numbers for the line of the round: "name", or "name/site"."""


@dataclass(frozen=True)
class RunSetup:
    """What a run begins with: the plan, and the weights that everyone starts from.

    `grids` are the shapes (Z, Y, X) of the public images, by name, where there are any.
    """

    plan: Plan
    weights: Arrays
    grids: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)


class LearningRateCycle(NamedTuple):
    """The rounds after one, up to the last, over which the learning rate falls from its first value to 0."""

    after: int
    last: int


class ClientContext(Protocol):
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
        agreed: LabelMaps | None = None,
        weight: float = 0.0,
        act: LearningRateCycle | None = None,
    ) -> LocalResult:
        """Train from `weights` on the site's patients, for as many steps as the plan gives it in a round; once a round.

        `proximal` times the way from `weights` so far and the `correction` are added to every step's gradient, and
        `weight` times that of public images with the labels `agreed` on. The learning rate falls to 0 over the rounds
        of an `act`, or over all rounds; it always does over all of them where a private mechanism takes the steps.

        Args:
            weights: What to start from, by name.
            proximal: FedProx's mu: so many times the way from `weights` is added to every step's
                gradient.
            correction: SCAFFOLD's correction of every step's gradient, by the names of the weights.
            agreed: Label maps (Z, Y, X) of public images, by image, to learn from as well.
            weight: The weight of their gradient beside that of the patients; 0 leaves them out.
            act: The rounds over which the learning rate falls to 0; None for all rounds.
        """
        ...

    def label(self, members: Sequence[Arrays], passes: int = 0) -> dict[str, np.ndarray]:
        """What an ensemble says of every public image (`pseudo.write`).

        Each member looks so many `passes` more, in which channels of its network drop out.
        """
        ...

    def fit_unreleased(self, agreed: LabelMaps, weight: float, act: LearningRateCycle) -> None:
        """Where a private mechanism trains what `fit` gives: train a better model without it, for the site alone.

        It gives nothing back and raises nothing, so that nothing that leaves can depend on it.
        """
        ...

    def averaged(self, weights: Arrays) -> Arrays:
        """The moving average of the site's own models with these, of this round; with no `training.ema` just these."""
        ...

    def mean_effective_steps(self, proximal: float = 0.0) -> float:
        """The `LocalResult.effective_steps` of this round on average over the sites, weighted by patients."""
        ...

    def memory(self) -> ArrayGroups | None:
        """What the site remembered in the last round in which its answer counted, or None before there was one."""
        ...

    def remember(self, groups: ArrayGroups) -> None:
        """Keep groups of arrays on the site's own disk for the next round; they never leave."""
        ...


class Algorithm(ABC):
    """One way of learning together. A subclass is a frozen dataclass, and its fields are its hyper-parameters.

    `start` and `merge` run at the coordinator, `local` at each site; these three it must have. The class variables say
    what it is like, and the other methods what it needs and costs; whatever it leaves out is as it stands here.
    """

    centralised: ClassVar[bool] = False
    """Whether it needs all data in one place; such an algorithm runs only in a simulation."""

    personalised: ClassVar[bool] = False
    """Whether every site has a model of its own, which is what the patients that it holds out are for."""

    released: ClassVar[Mapping[str, str]] = {"update": "weights"}
    """The groups that every answer must hold, each with the shared group whose names, shapes and dtypes it must have.

    These are what is added to the shared groups, and what travels in the plan's wire precision.
    """

    resets_momentum: ClassVar[bool] = False
    """Whether it counts a site's way in a round from rest, so that momentum of earlier rounds would be miscounted."""

    shares_pseudo_labels: ClassVar[bool] = False
    """Whether labels of public images travel and no weights: then sites may have networks and grids of their own."""

    is_dp_postprocessing: ClassVar[bool] = False
    """Whether its answers are made by weights of `ClientContext.fit` alone, as a private mechanism trained them.

    Only then do they leave a site with such a mechanism: nothing else about them bounds what they tell of a patient.
    """

    preset: ClassVar[str] = "plain"
    """The network that it is published with, which a plan takes unless another is asked for."""

    @abstractmethod
    def start(self, setup: RunSetup) -> ServerState:
        """The state before the first round."""

    @abstractmethod
    def local(self, site: ClientContext, request: Request) -> ArrayGroups:
        """A site's part of a round: named groups of arrays. They pass the site's mechanism before they leave."""

    @abstractmethod
    def merge(self, state: ServerState, responses: Sequence[Response], average: AverageGroup) -> ServerState:
        """The state after a round, from what the sites released."""

    def plan_problems(self, plan: Plan) -> list[str]:
        """What it needs of a site's plan and does not find there; then there is no training."""
        return []

    def misfits(self, arrays: ArrayGroups, shared: ArrayGroups) -> list[str]:
        """What it finds wrong with a site's answer to what was shared; such a site is left out of the round."""
        return []

    @classmethod
    def passes(cls, settings: Mapping[str, Any], *, private: bool) -> float:
        """What a step computes at a site, in passes over its patients' patches: 1 where nothing else teaches.

        The settings are those of a plan, which nobody has looked at yet; those that it would refuse count as not given.
        """
        return 1.0

    @classmethod
    def shares_weights(cls) -> bool:
        """Whether the sites' updates of common weights are averaged, and the noise in them with them."""
        return "weights" in cls.released.values()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        problems = list(_slips(cls))
        if problems:
            raise TypeError(f"{cls.__name__}: {'; '.join(problems)}")


_NEARLY = 0.8
"""Names that are alike to this share are taken for a slip of the pen."""


def _slips(kind: type[Algorithm]) -> Iterator[str]:
    """What a subclass states that nobody will ask it for; a slip of the pen would go unnoticed."""
    contract = [name for name in vars(Algorithm) if not name.startswith("_")]
    annotations = get_annotations(kind)
    for name in dict.fromkeys([*annotations, *vars(kind)]):
        if name.startswith("_"):
            continue
        is_field = name in annotations and "ClassVar" not in str(annotations[name])
        is_code = callable(vars(kind).get(name)) or hasattr(vars(kind).get(name), "__get__")
        near = get_close_matches(name, contract, 1, _NEARLY)
        if name in contract:
            if is_field:
                yield f"{name} is no hyper-parameter; write {name}: ClassVar, or give the hyper-parameter another name"
        elif near:
            yield f"{name} is not asked for; did you mean {near[0]}?"
        elif not (is_field or is_code):
            yield (f"{name} is not asked for; the class variables are {', '.join(_variables())}, and a hyper-parameter "
                   f"is written {name}: float = ...")  # fmt: skip


def _variables() -> list[str]:
    return sorted(name for name in get_annotations(Algorithm) if not name.startswith("_"))

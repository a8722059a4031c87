"""How sites learn together: one file per algorithm, each a frozen dataclass whose fields are its hyper-parameters.

An algorithm runs in three places: `start` and `merge` at the coordinator, `local` at each site. It knows a site only by
`ClientContext`, and it never combines what comes from patients itself: it calls the `average` it is handed (`base`).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection
from dataclasses import fields, is_dataclass
from inspect import isabstract
from typing import Any

from autofed.algorithms.base import (
    NOTES,
    PREDICTIONS,
    PSEUDO_LABELS,
    Algorithm,
    AverageGroup,
    ClientContext,
    LearningRateCycle,
    RunSetup,
)
from autofed.errors import ValidationErrors, raise_if_any
from autofed.plans import AlgorithmSettings

__all__ = [
    "NOTES",
    "PREDICTIONS",
    "PSEUDO_LABELS",
    "Algorithm",
    "AverageGroup",
    "ClientContext",
    "LearningRateCycle",
    "RunSetup",
    "find",
    "make",
    "names",
    "stated",
]  # fmt: skip

_CONTRACT = "base"


def names() -> list[str]:
    """The algorithms that exist, by the names of their files."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != _CONTRACT)


def find(name: str, trusted: Collection[str] = ()) -> type[Algorithm]:
    """The algorithm class in the file of that name, or in "package.module:Class" if that name is `trusted`.

    A plan comes from elsewhere and must not make a site run code, so a name of the second form counts only if the user
    or the site's own policy gave it. `ValidationErrors` lists the names that exist.
    """
    module_name, colon, class_name = name.partition(":")
    if name not in trusted if colon else name not in names():
        why = "names code outside autofed, which this site did not allow" if colon else "does not exist"
        raise ValidationErrors(
            "the algorithm", [f"the algorithm {name!r} {why}; the algorithms are: {', '.join(names())}"]
        )
    try:
        module = importlib.import_module(module_name if colon else f"{__name__}.{name}")
        kind: Any = getattr(module, class_name) if colon else _only_algorithm(module)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValidationErrors("the algorithm", [f"{name!r} cannot be loaded ({error})"]) from None
    if not _is_algorithm(kind):
        expected = "expected a frozen dataclass that extends autofed.algorithms.Algorithm"
        raise ValidationErrors("the algorithm", [f"{name!r} is not a dataclass with start, local, merge; {expected}"])
    algorithm: type[Algorithm] = kind
    return algorithm


def make(settings: AlgorithmSettings, trusted: Collection[str] = ()) -> Algorithm:
    """The algorithm that a plan names, with the plan's settings; `ValidationErrors` names every setting it does not
    have.
    """
    kind = find(settings.name, trusted)
    setting_names = {f.name for f in fields(kind)}  # type: ignore[arg-type]  # `find` gives dataclasses alone
    raise_if_any(
        "agreement.algorithm.settings",
        [
            f"{settings.name} has no setting {name!r}; it has: {', '.join(sorted(setting_names)) or 'none'}"
            for name in settings.settings
            if name not in setting_names
        ],
    )
    return kind(**settings.settings)


def stated(name: str) -> type[Algorithm]:
    """What an algorithm states of itself: its class if it is one of autofed's own, or else what `Algorithm` states.

    So a plan can be checked against the algorithm that it names without running code from elsewhere.
    """
    return find(name) if name in names() else Algorithm


def _is_algorithm(kind: Any) -> bool:
    is_subclass = isinstance(kind, type) and issubclass(kind, Algorithm)
    return is_subclass and is_dataclass(kind) and not isabstract(kind)


def _only_algorithm(module: Any) -> type[Algorithm]:
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Algorithm) and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise AttributeError(f"the file must define one algorithm, it defines {len(classes)}")
    return classes[0]

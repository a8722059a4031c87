"""Bad input, said clearly and all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")

MAX_SHOWN = 20
"""So many problems are printed; `ValidationErrors.problems` holds them all."""


class ValidationErrors(ValueError):
    """What is wrong with an input: one sentence per problem, each with what was found, expected and how to mend it."""

    def __init__(self, about: str, problems: Iterable[str]):
        self.about = about
        self.problems = tuple(problems)
        super().__init__(self._text())

    def _text(self) -> str:
        if len(self.problems) == 1:
            return f"{self.about}: {self.problems[0]}"
        lines = [f"  - {p}" for p in self.problems[:MAX_SHOWN]]
        more = len(self.problems) - MAX_SHOWN
        if more > 0:
            lines.append(f"  ... and {more} more of the like")
        return "\n".join([f"{self.about}: {len(self.problems)} problems", *lines])

    def __reduce__(self):
        return type(self), (self.about, self.problems)  # crosses the border of a worker process whole


def raise_if_any(about: str, problems: Iterable[str]) -> None:
    """Raise `ValidationErrors` if there is at least one."""
    found = tuple(problems)
    if found:
        raise ValidationErrors(about, found)


class Attempts:
    """Calls that may refuse, tried one after the other; see `attempts`."""

    def __init__(self, about: str):
        self.about = about
        self.problems: list[str] = []

    def __call__(self, call: Callable[P, R], /, *args: P.args, **keywords: P.kwargs) -> R:
        """What the call gives. What it refuses is noted, and nobody sees the None that comes instead."""
        try:
            return call(*args, **keywords)
        except ValidationErrors as error:
            self.problems += prefixed_problems(error, self.about)
            return cast("R", None)


@contextmanager
def attempts(about: str) -> Iterator[Attempts]:
    """For several calls that may refuse: `with attempts("plan") as attempt: budget = attempt(parse, text)`.

    The block's end raises one `ValidationErrors` with those of all calls, so what they gave counts only after it.
    """
    attempt = Attempts(about)
    yield attempt
    raise_if_any(about, attempt.problems)


def collect_errors(about: str, calls: Iterable[Callable[[], R]]) -> list[R]:
    """What calls of one kind give, in their order; one `ValidationErrors` with those of all calls if any of them
    refuses.
    """
    with attempts(about) as attempt:
        return [attempt(call) for call in calls]


def prefixed_problems(error: ValidationErrors, about: str = "") -> list[str]:
    """Its problems as parts of a larger list, each with what it is about, unless the list is about the same."""
    return list(error.problems) if error.about == about else [f"{error.about}: {p}" for p in error.problems]

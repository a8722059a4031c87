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

    def __reduce__(self) -> tuple[type[ValidationErrors], tuple[str, tuple[str, ...]]]:
        return type(self), (self.about, self.problems)  # so that a worker process can send it back


def raise_if_any(about: str, problems: Iterable[str]) -> None:
    """Raise `ValidationErrors` if there is at least one."""
    sentences = tuple(problems)
    if sentences:
        raise ValidationErrors(about, sentences)


class Attempts:
    """Calls that may raise `ValidationErrors`, tried one after the other; see `attempts`."""

    def __init__(self, about: str):
        self.about = about
        self.problems: list[str] = []

    def __call__(self, call: Callable[P, R], /, *args: P.args, **keywords: P.kwargs) -> R:
        """The call's result, or None (which no caller sees) after collecting the problems that it raised."""
        try:
            return call(*args, **keywords)
        except ValidationErrors as error:
            self.problems += prefixed_problems(error, self.about)
            return cast("R", None)


@contextmanager
def attempts(about: str) -> Iterator[Attempts]:
    """For several calls that may raise: `with attempts("plan") as attempt: budget = attempt(parse, text)`.

    The block's end raises one `ValidationErrors` with the problems of all calls, so use their results only after it.
    """
    attempt = Attempts(about)
    yield attempt
    raise_if_any(about, attempt.problems)


def collect_errors(about: str, calls: Iterable[Callable[[], R]]) -> list[R]:
    """The results of calls of one kind, in their order; one `ValidationErrors` with the problems of all calls if any
    raises it.
    """
    with attempts(about) as attempt:
        return [attempt(call) for call in calls]


def prefixed_problems(error: ValidationErrors, about: str = "") -> list[str]:
    """Its problems as parts of a larger list, each with what it is about, unless the list is about the same."""
    return list(error.problems) if error.about == about else [f"{error.about}: {p}" for p in error.problems]

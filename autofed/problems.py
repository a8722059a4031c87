"""Bad input, said clearly and all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

SHOWN = 20
"""So many problems are printed; `Problems.problems` holds them all."""


class Problems(ValueError):
    """What is wrong with an input: one sentence per problem, each with what was found, expected and how to mend it."""

    def __init__(self, about: str, problems: Iterable[str]):
        self.about = about
        self.problems = tuple(problems)
        super().__init__(self._text())

    def _text(self) -> str:
        if len(self.problems) == 1:
            return f"{self.about}: {self.problems[0]}"
        lines = [f"  - {p}" for p in self.problems[:SHOWN]]
        more = len(self.problems) - SHOWN
        if more > 0:
            lines.append(f"  ... and {more} more of the like")
        return "\n".join([f"{self.about}: {len(self.problems)} problems", *lines])

    def __reduce__(self):
        return type(self), (self.about, self.problems)  # crosses the border of a worker process whole


def refuse(about: str, problems: Iterable[str]) -> None:
    """Raise `Problems` if there is at least one."""
    found = tuple(problems)
    if found:
        raise Problems(about, found)


def gathered(about: str, calls: Iterable[Callable[[], Any]]) -> list[Any]:
    """What the calls give, in their order; one `Problems` with those of all calls if any of them refuses."""
    results, problems = [], []
    for call in calls:
        try:
            results.append(call())
        except Problems as error:
            problems += [f"{error.about}: {problem}" for problem in error.problems]
    refuse(about, problems)
    return results

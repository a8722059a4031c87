"""One line per decision: what was set, to what, and why."""

from __future__ import annotations

from collections.abc import Sequence

from autofed.plans import Code, Reason


class Reasons:
    """The decisions of one plan, in the order in which they were taken."""

    def __init__(self) -> None:
        self._lines: dict[str, Reason] = {}

    def say(self, field: str, value: object, why: str, code: Code = "planned") -> None:
        """Note a decision; `field` is the full path in the plan. A later word on a field replaces an earlier one."""
        self._lines[field] = Reason(field=field, value=str(value), why=why, code=code)

    def add(self, field: str, why: str, *, instead: bool = False) -> None:
        """Add to why a field is what it is, or say something else `instead`; nothing if nothing was said of it."""
        if line := self._lines.get(field):
            self._lines[field] = line.model_copy(update={"why": why if instead else f"{line.why}; {why}"})

    @property
    def lines(self) -> tuple[Reason, ...]:
        """All that was said."""
        return tuple(self._lines.values())


def short(numbers: Sequence[float]) -> str:
    """Sizes or spacings as a person writes them: 1 x 0.78 x 0.78."""
    return " x ".join(f"{n:g}" for n in numbers)

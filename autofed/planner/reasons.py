"""The reasons of a plan: for each decision the field, its value, and why."""

from __future__ import annotations

from collections.abc import Sequence

from autofed.plans import Code, Reason


class Reasons:
    """The decisions of one plan, in the order in which they were taken."""

    def __init__(self) -> None:
        self._lines: dict[str, Reason] = {}

    def record(self, field: str, value: object, why: str, code: Code = "planned") -> None:
        """Record a decision; `field` is the full path in the plan. A later reason of a field replaces an earlier."""
        self._lines[field] = Reason(field=field, value=str(value), why=why, code=code)

    def amend(self, field: str, why: str, *, instead: bool = False) -> None:
        """Add to the reason of a field, or replace it if `instead`; no effect for a field without a reason."""
        if line := self._lines.get(field):
            self._lines[field] = line.model_copy(update={"why": why if instead else f"{line.why}; {why}"})

    @property
    def lines(self) -> tuple[Reason, ...]:
        """All reasons."""
        return tuple(self._lines.values())


def format_axes(numbers: Sequence[float]) -> str:
    """Sizes or spacings of all axes as a person writes them: 1 x 0.78 x 0.78."""
    return " x ".join(f"{n:g}" for n in numbers)

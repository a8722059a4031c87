"""Why a field of a plan is what it is: a code that the program decides by, and a sentence for people."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from autofed.files import Record

Code = Literal["planned", "by-hand"]

_BY_HAND = "set by hand"


class Reason(Record):
    """One decision: which field, what it became, and why.

    The code is not written to plan.json, whose form and digest stay as they always were: of a reason that is read, it
    is told from the sentence (`_code_of`), once and nowhere else (docs/decisions/0014).
    """

    field: str
    value: str
    why: str
    code: Code = Field("planned", exclude=True)

    @classmethod
    def by_hand(cls, field: str, value: str, planned: str | None) -> Self:
        """A field that a person set, instead of what was `planned` if there was a reason for that."""
        why = _BY_HAND if planned is None else f"{_BY_HAND}, instead of {planned}"
        return cls(field=field, value=value, why=why, code="by-hand")

    @model_validator(mode="before")
    @classmethod
    def _with_code(cls, content: Any, info: ValidationInfo) -> Any:
        is_read = info.mode == "json" and isinstance(content, dict) and "code" not in content
        return {**content, "code": _code_of(str(content.get("why")))} if is_read else content


def _code_of(why: str) -> Code:
    """The code of a reason in plan.json, by its sentence; what was taken over from another plan quotes that of it."""
    return "by-hand" if _BY_HAND in why else "planned"

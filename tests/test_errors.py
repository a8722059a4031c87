from __future__ import annotations

import copy
import pickle

import pytest

from autofed.errors import MAX_SHOWN, ValidationErrors, raise_if_any


def test_one_problem_stands_on_one_line():
    assert str(ValidationErrors("plan.json", ["no such field"])) == "plan.json: no such field"


def test_several_problems_are_counted_and_listed():
    text = str(ValidationErrors("plan.json", ["first", "second"]))
    assert text.splitlines() == ["plan.json: 2 problems", "  - first", "  - second"]


def test_a_long_list_is_cut_in_print_but_held_whole():
    error = ValidationErrors("site", [f"problem {i}" for i in range(MAX_SHOWN + 5)])
    assert len(error.problems) == MAX_SHOWN + 5
    assert str(error).splitlines()[-1] == "  ... and 5 more of the like"
    assert f"problem {MAX_SHOWN}" not in str(error)


@pytest.mark.parametrize("carry", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_it_crosses_to_another_process_whole(carry):
    error = carry(ValidationErrors("site", ["one", "two"]))
    assert (error.about, error.problems) == ("site", ("one", "two"))
    assert str(error).startswith("site: 2 problems")


def test_refuse_is_silent_when_nothing_is_wrong():
    raise_if_any("site", iter([]))


def test_refuse_raises_all_at_once():
    with pytest.raises(ValidationErrors) as caught:
        raise_if_any("site", (p for p in ["one", "two"]))
    assert caught.value.problems == ("one", "two")


def test_problems_are_value_errors():
    assert issubclass(ValidationErrors, ValueError)

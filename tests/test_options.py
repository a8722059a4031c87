"""The keywords of the verbs: records and typed dictionaries agree, and a wrong keyword names the right one."""

import inspect
from dataclasses import FrozenInstanceError, fields

import pytest

import autofed
from autofed import api
from autofed.api import options

RECORDS = ("PrivateFingerprint", "Plan", "Train", "Predict", "Run")


@pytest.mark.parametrize("name", RECORDS)
def test_editors_are_told_the_fields_of_the_record(name):
    record, keywords = getattr(options, f"{name}Options"), getattr(options, f"{name}Keywords")
    told = {word: kind.__forward_arg__ for word, kind in keywords.__annotations__.items()}
    assert told == {field.name: field.type for field in fields(record)}


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_is_described(name):
    record = getattr(options, f"{name}Options")
    lines = inspect.getsource(record).splitlines()
    for field in fields(record):
        (at,) = (i for i, line in enumerate(lines) if line.startswith(f"    {field.name}: "))
        assert lines[at + 1].startswith('    """'), f"{name}.{field.name} says nothing of itself"


def test_options_do_not_change():
    with pytest.raises(FrozenInstanceError):
        options.PlanOptions().hours = 2


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: autofed.plan(["."], hour=1),
            "plan.. got an unexpected keyword argument 'hour'; did you mean hours",
        ),
        (lambda: autofed.train("p", "w", "r", resum=True), "did you mean resume"),
        (lambda: autofed.predict("r", "i", "o", colour="red"), "its keywords are spacing_mm, model, folds"),
        (lambda: api.private_fingerprint("site"), "missing a required (keyword-only )?argument: 'work'"),
        (lambda: autofed.train("p"), "missing a required argument: 'work'"),
    ],
)
def test_a_wrong_keyword_names_the_right_one(call, says):
    with pytest.raises(TypeError, match=says):
        call()


def test_a_verb_shows_its_keywords():
    shown = inspect.signature(autofed.plan).parameters
    assert list(shown)[:3] == ["sources", "output", "hours"] and shown["device"].default == "auto"
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in shown.values())


def test_the_verbs_are_among_the_names_of_the_package():
    assert {"plan", "train", "run", "predict", "evaluate", "fingerprint", "preprocess"} <= set(dir(autofed))

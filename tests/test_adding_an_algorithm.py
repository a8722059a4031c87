"""docs/adding-an-algorithm.md, followed to the letter."""

import re
import shlex
from inspect import get_annotations
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from autofed import plans
from autofed.algorithms import Algorithm
from autofed.cli import app
from autofed.messages import load_groups
from tests.synthetic import make_site

PAGE = Path(__file__).parent.parent / "docs" / "adding-an-algorithm.md"


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.usefixtures("one_processor")
def test_the_page_works_as_it_is_written(tmp_path, monkeypatch):
    (source,), (commands,) = blocks("python"), blocks("console")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "careful.py").write_text(source)
    for site in ("alpha", "bravo"):
        make_site(tmp_path / site, cases=2)
    first, *others = commands.splitlines()
    assert first == "export PYTHONPATH=."
    monkeypatch.syspath_prepend(".")
    for line in others:
        program, *arguments = shlex.split(line)
        if arguments[0] == "train":
            shorten(tmp_path / "plan.json")
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert program == "autofed" and done.exit_code == 0, done.output
    made = plans.load(tmp_path / "RUN" / "plan.json")
    assert (made.agreement.algorithm.name, made.agreement.algorithm.settings) == ("careful:Careful", {"share": 0.7})
    weights = load_groups(tmp_path / "RUN" / "fold_all" / "round_00002" / "shared.safetensors")[0]["weights"]
    assert all(np.isfinite(array).all() for array in weights.values())


def shorten(path):
    """Two rounds of one step with a small network: the page is about the way, not about a good model."""
    made = plans.load(path)
    stages = len(made.local.network.features)
    made.change(
        {"network.features": [4] * stages, "training.rounds": 2, "steps_per_round": 1, "training.batch_size": 2}
    ).save(path)


def test_the_page_names_the_class_variables_that_there_are():
    named = re.findall(r"^\* `(\w+) = ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(get_annotations(Algorithm))


def test_the_page_is_short():
    own = [line for block in blocks("python") for line in block.splitlines()]
    rest = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.strip() and line not in own]
    assert len(rest) <= len(own)

"""Plans that follow another: which part comes from which, and sites that join or fine-tune, from end to end."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

import autofed
from autofed import cli, plans
from autofed.errors import ValidationErrors
from autofed.federation import checkpoints
from autofed.federation.run_folder import Run
from autofed.messages import load_groups
from autofed.planner import follow
from autofed.planner.forecast import total_steps
from autofed.plans import Budget
from tests.equality import same_arrays
from tests.plans_made import SPEED, fingerprint, reason, small_plan
from tests.synthetic import make_site

BUDGET = Budget(hours=0.01, speed=SPEED)


def reference_plan(**settings):
    defaults = {"learning_rate": 0.02, "training.mirror_axes": [1], "inference.overlap": 0.25, "training.rounds": 9}
    return small_plan(channels=("CT",), labels={"background": 0, "organ": 1, "tumour": 2}, **defaults, **settings)


def data(sites=("alpha", "bravo", "echo"), spacing_mm=(1.0, 1.0, 1.0), cases=30, channels=("CT",), **options):
    options = {"labels": {"background": 0, "organ": 1, "tumour": 2}, **options}
    return fingerprint((24, 24, 24), spacing_mm, cases, channels, sites=sites, **options)


def test_what_weights_depend_on_is_the_references_and_all_else_the_sites():
    plan, reference = follow(data(spacing_mm=(3.0, 2.0, 2.0)), reference_plan(), "RUN", BUDGET), reference_plan()
    same = {"steps_per_round": plan.local.training.steps_per_round}
    training = reference.local.training.model_copy(update=same)
    assert plan.local == reference.local.model_copy(update={"training": training})
    assert plan.local.preprocessing_digest() == reference.local.preprocessing_digest()
    assert plan.inference == reference.inference and plan.inference.overlap == 0.25
    assert plan.agreement.patients == {"alpha": 10, "bravo": 10, "echo": 10}
    assert plan.agreement.faults.least_sites == 2
    assert plan.budget.hours == 0.01 and plan.budget.speed == SPEED


def test_rounds_and_steps_fit_the_hours_with_the_references_network():
    sites_and_hours = ((("echo",), 0.01), (("alpha", "echo"), 0.01), (("echo",), 0.04), (("echo",), None))
    budgets = [(sites, BUDGET.model_copy(update={"hours": hours})) for sites, hours in sites_and_hours]
    steps = (total_steps(follow(data(sites), reference_plan(), "RUN", budget)) for sites, budget in budgets)
    alone, two_sites, four_times, unlimited = steps
    network, training = reference_plan().local.network, reference_plan().local.training
    assert alone == pytest.approx(36 * 0.8 / SPEED.seconds(network, training.patch_size, training.batch_size), rel=0.05)
    assert two_sites == pytest.approx(alone / 2, rel=0.1) and four_times == pytest.approx(alone * 4, rel=0.05)
    assert unlimited == pytest.approx(250e3, rel=0.01)


def test_the_algorithm_is_the_references_unless_another_is_named():
    settings = {"algorithm.name": "fedprox", "algorithm.settings": {"mu": 0.1}, "average.rule": "median",
                "server.optimiser": "momentum", "training.ema": 0.5, "wire": "bfloat16",
                "faults.attempts": 7, "annotated": {"alpha": ["organ"], "bravo": ["tumour"]}}  # fmt: skip
    reference = reference_plan(**settings)
    agreement = follow(data(("bravo", "echo")), reference, "RUN", BUDGET).agreement
    for field in ("algorithm", "average", "server", "wire"):
        assert getattr(agreement, field) == getattr(reference.agreement, field)
    assert (
        agreement.faults.attempts == 7 and agreement.training.ema == 0.5 and agreement.annotated == {}
    )  # as the fingerprints say
    averaged = follow(data(), reference, "RUN", BUDGET, algorithm="fedavg")
    assert averaged.agreement.algorithm == plans.AlgorithmSettings(name="fedavg")
    assert "RUN has fedprox" in reason(averaged, "agreement.algorithm")


def test_the_reasons_say_what_was_taken_from_where():
    plan = follow(data(spacing_mm=(3.0, 2.0, 2.0)), reference_plan(), "RUN", BUDGET)
    patch = "local.training.patch_size"
    assert reason(plan, patch) == f"as in RUN: {reason(reference_plan(), patch)}"
    assert "these sites' cases alone would be planned at 3 x 2 x 2" in reason(plan, "local.geometry.spacing_mm")
    assert "alone" not in reason(follow(data(), reference_plan(), "RUN", BUDGET), "local.geometry.spacing_mm")
    assert "set a tenth" in reason(plan, "local.training.learning_rate")
    assert "fit 0.01 h" in reason(plan, "local.training.steps_per_round")
    again = follow(data(), plan, "RUN2", BUDGET)
    assert reason(again, patch).startswith("as in RUN2: as in RUN: ")


def test_a_structure_that_the_new_sites_lack_is_no_obstacle_but_is_said():
    echo = data(("echo",))
    empty = echo.classes["tumour"].model_copy(update={"cases": 0})
    plan = follow(
        echo.model_copy(update={"classes": {**echo.classes, "tumour": empty}}), reference_plan(), "RUN", BUDGET
    )
    assert "tumour" in plan.agreement.labels and "forgotten" in reason(plan, "agreement.labels")


def test_all_problems_are_named_at_once():
    private = reference_plan().change({"privacy.mechanism": "magic"})
    other_task = data(channels=("MRI", "T2"), labels={"background": 0, "tumour": 1, "organ": 2}, sites=("echo",))
    with pytest.raises(ValidationErrors) as error:
        follow(other_task, private, "RUN", Budget(hours=1))
    text = str(error.value)
    assert len(error.value.problems) == 4
    for part in ("channels 2 (MRI, T2), RUN has 1 (CT)", "declare labels", "RUN is private", "no speed"):
        assert part in text


@pytest.mark.parametrize(
    ("reference", "sites", "difference"),
    [
        ({"shape": (1, 32, 32)}, {}, "dimension 3D, RUN has 2D"),
        (
            {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "order": (1, 2)},
            {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "order": (2, 1)},
            "declare labels",
        ),
    ],
)
def test_another_dimension_or_order_of_regions_is_another_task(reference, sites, difference):
    with pytest.raises(ValidationErrors, match=difference):
        follow(fingerprint(**sites), small_plan(**reference), "RUN", BUDGET)


# --- from end to end


SETTINGS = {"training.batch_size": 2, "training.steps_per_round": 1, "training.rounds": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a model that two sites trained, and the data of a third site with thicker slices."""
    root = tmp_path_factory.mktemp("following")
    sites = [make_site(root / "raw" / name, cases=2) for name in ("alpha", "bravo")]
    make_site(root / "raw" / "echo", cases=3, spacing_mm=(2.0, 1.0, 1.0))
    stages = len(autofed.plan(sites, hours=0.01, device="cpu").local.network.features)
    autofed.plan(sites, root / "plan.json", hours=0.01, device="cpu",
                 settings={**SETTINGS, "network.features": [4] * stages})  # fmt: skip
    autofed.preprocess(root / "plan.json", sites, root / "work")
    autofed.train(root / "plan.json", root / "work", root / "RUN", device="cpu")
    autofed.train(root / "plan.json", root / "work", root / "ALONE", algorithm="local", device="cpu")
    return root


def plan_and_train(root, folder, sites, like, init, **options):
    """Plan, preprocess and train as a site would; gives the run and how many cases were preprocessed anew."""
    raw = [root / "raw" / site for site in sites]
    autofed.plan(raw, folder / "plan.json", hours=0.01, device="cpu", like=like, settings=SETTINGS, **options)
    new = autofed.preprocess(folder / "plan.json", raw, root / "work")
    return autofed.train(folder / "plan.json", root / "work", folder / "run", init=init, device="cpu"), new


def shared_weights(run, round=2):
    return checkpoints.load(Run(run).fold_folder(), round).shared["weights"]


def test_a_site_joins_a_model_that_others_trained(finished, tmp_path):
    run, new = plan_and_train(finished, tmp_path, ("alpha", "bravo", "echo"), finished / "RUN", finished / "RUN")
    assert new == {"alpha": 0, "bravo": 0, "echo": 3}  # the grid is the same: preprocessed cases stay
    assert same_arrays(run.start(), shared_weights(finished / "RUN"))
    assert not same_arrays(shared_weights(run.folder), run.start()) and run.models() == ["global"]
    assert run.plan().local.network == Run(finished / "RUN").plan().local.network
    assert "as in" in (tmp_path / "plan.json").read_text()


def test_one_site_fine_tunes_a_finished_model_and_predicts_with_it(finished, tmp_path):
    run, _ = plan_and_train(finished, tmp_path, ("echo",), finished / "plan.json", finished / "RUN")
    assert run.plan().agreement.patients == {"echo": 3} and same_arrays(run.start(), shared_weights(finished / "RUN"))
    prediction = autofed.predict(run.folder, np.zeros((1, 12, 16, 16)), spacing_mm=(2, 1, 1), mirroring=False)
    assert prediction.labels.shape == (12, 16, 16)


def test_a_site_goes_on_from_the_model_of_another(finished, tmp_path):
    model = finished / "ALONE/sites/bravo/fold_all/memory/round_00002.safetensors"
    run, _ = plan_and_train(finished, tmp_path, ("echo",), finished / "ALONE", model, algorithm="fedavg")
    assert run.plan().agreement.algorithm.name == "fedavg" and run.models() == ["global"]
    assert same_arrays(run.start(), load_groups(model)[0]["weights"])
    assert not same_arrays(run.start(), shared_weights(finished / "RUN"))


def test_what_the_reference_decides_cannot_be_asked_for(finished, tmp_path):
    with pytest.raises(ValidationErrors) as error:
        autofed.plan([finished / "raw/echo"], tmp_path / "plan.json", like=finished / "RUN", hours=-1, device="cpu",
                     memory_gb=4, preset="resenc-m", configuration="2d")  # fmt: skip
    text = str(error.value)
    assert all(f"--{name} was given" in text for name in ("memory", "preset", "configuration")) and "hours" in text
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(("like", "says"), [("raw", "plan.json: there is no such file"), ("nowhere", "no such file")])
def test_what_is_neither_a_run_nor_a_plan_is_not_followed(finished, like, says):
    with pytest.raises(ValidationErrors, match=says):
        autofed.plan([finished / "raw/echo"], like=finished / like, hours=0.01, device="cpu")


def test_an_idle_server_step_is_refused_when_planning_and_before_training(finished, tmp_path):
    settings = {"server.optimiser": "adam"}
    with pytest.raises(ValidationErrors, match="local shares no weights"):
        autofed.plan([finished / "raw/echo"], hours=0.01, device="cpu", algorithm="local", settings=settings)
    plan = plans.load(finished / "plan.json").change(settings)
    with pytest.raises(ValidationErrors, match="local shares no weights"):
        autofed.train(plan, finished / "work", tmp_path / "run", algorithm="local", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("one_processor")
def test_the_same_from_the_shell(finished, tmp_path, monkeypatch, capsys):
    options = ["--hours", 0.01, "--device", "cpu", "--set", "server.optimiser=momentum", "--set", "server.rate=0.2"]
    arguments = ["plan", finished / "raw/echo", "--like", finished / "RUN", "-o", tmp_path / "plan.json", *options]
    monkeypatch.setattr(sys, "argv", ["autofed", *map(str, arguments)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "as in" in capsys.readouterr().out
    value = json.loads((tmp_path / "plan.json").read_text())
    assert list(value["agreement"]["patients"]) == ["echo"]
    assert value["agreement"]["server"] | {"optimiser": "momentum", "rate": 0.2} == value["agreement"]["server"]
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", ["autofed", "plan", str(tmp_path / "plan.json"), "--like", "RUN"])
        cli.main()
    assert "--like was given" in capsys.readouterr().err

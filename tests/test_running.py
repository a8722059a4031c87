"""One command for plan, preprocessing and training: it goes on where it was, and says what it came to."""

import json

import pytest

import autofed
from autofed import plans
from autofed.api import outcomes
from autofed.errors import ValidationErrors
from autofed.federation.run_folder import Run
from tests.synthetic import make_site
from tests.test_cli import call

SMALL = {"training.rounds": 3, "training.steps_per_round": 1, "training.batch_size": 2, "network.features": [4, 4, 4]}
ASKED = {"hours": 0.01, "device": "cpu", "settings": SMALL}


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """A folder with two sites in sites/."""
    folder = tmp_path_factory.mktemp("federation")
    for name in ("alpha", "bravo"):
        make_site(folder / "sites" / name, cases=6)
    return folder


@pytest.fixture(scope="module")
def finished(federation):
    """A run of fold 0, by one call."""
    return autofed.run([federation], federation / "RUN", folds=["0"], **ASKED)


def test_one_call_plans_prepares_and_trains(federation, finished):
    assert finished.finished("0") == 3 and finished.held_out("0")
    assert plans.load(federation / "RUN" / "plan.json").agreement.patients == {"alpha": 6, "bravo": 6}
    assert {path.parent.name for path in (federation / "work").glob("*/ledger.jsonl")} == {"alpha", "bravo"}


def test_the_same_call_changes_nothing_and_needs_no_option_again(federation, finished):
    before = {p: p.read_bytes() for p in (federation / "RUN").rglob("*.safetensors")}
    again = autofed.run([federation], federation / "RUN")
    assert again.folds() == ["0"]
    autofed.run([federation / "sites" / name for name in ("alpha", "bravo")], federation / "RUN", hours=0.01)
    assert before == {p: p.read_bytes() for p in (federation / "RUN").rglob("*.safetensors")}


def test_a_call_that_would_have_given_another_plan_is_refused(federation, finished):
    with pytest.raises(ValidationErrors) as error:
        autofed.run([federation], federation / "RUN", hours=2, epsilon=8.0, work=federation / "other")
    said = error.value.problems
    assert len(said) == 3 and said[0].startswith("it was begun with hours 0.01, now hours is 2; leave hours out")
    assert said[1].startswith("it was begun without epsilon, now epsilon is 8.0")
    assert not (federation / "other").exists()
    with pytest.raises(ValidationErrors, match="it was planned for alpha, bravo, found alpha; name the same sites"):
        autofed.run([federation / "sites" / "alpha"], federation / "RUN")


def test_a_run_that_train_began_is_left_to_train(federation, finished, tmp_path):
    autofed.train(finished.plan(), federation / "work", tmp_path / "RUN", rounds=1, device="cpu", simulation=True)
    with pytest.raises(ValidationErrors, match="not begun by `autofed run`; continue it with `autofed train --resume`"):
        autofed.run([federation], tmp_path / "RUN")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(ValidationErrors, match="holds no run but other files"):
        autofed.run([federation], tmp_path / "notes", **ASKED)
    (tmp_path / "alpha.json").write_text("{}")
    with pytest.raises(ValidationErrors, match="alpha.json is a file; name the folder"):
        autofed.run([tmp_path / "alpha.json"], tmp_path / "new", **ASKED)
    assert not (tmp_path / "new").exists()


def test_an_interrupted_call_goes_on_to_the_same_weights(federation, finished, tmp_path):
    def stop(stage, done, total):
        if stage == "training" and done == total // 2:
            raise KeyboardInterrupt

    wanted = {"folds": ["0"], "simulation": True, "work": federation / "work", **ASKED}
    with pytest.raises(KeyboardInterrupt):
        autofed.run([federation], tmp_path / "RUN", progress=stop, **wanted)
    assert 0 < Run(tmp_path / "RUN").finished("0") < 3
    run = autofed.run([federation], tmp_path / "RUN")
    assert run.finished("0") == 3 and run.identity().simulation
    one, other = ((folder / "fold_0" / "round_00003" / "shared.safetensors").read_bytes()
                  for folder in (finished.folder, run.folder))  # fmt: skip
    assert one == other


def test_a_line_a_round_goes_to_the_log_as_it_is_trained(federation, finished):
    lines = (federation / "RUN" / "train.log").read_text().splitlines()
    assert len(lines) == 3
    assert "fold 0: round 2 of 3: loss " in lines[1] and "Dice of held-out patients" in lines[1] and "left" in lines[1]
    assert "round 3 of 3" in lines[2] and lines[2].endswith("the last")


def test_a_training_says_how_good_it_was_and_what_predicts(federation, finished):
    said = "\n".join(outcomes.training_summary(finished, federation / "work"))
    assert "fold 0: training loss" in said and "after round 3 (after round 1 it was" in said
    (structure, dice), *_ = finished.held_out("0").items()
    assert f"Dice of the held-out cases: {structure} {dice:.4f}" in said
    assert f"fold 0: at bravo: {structure} {finished.held_out('0', 'bravo')[structure]:.4f}" in said
    assert "what predicts: RUN/global fold 0 best round" in said and "nobody was held out" not in said
    assert f"autofed train {federation / 'RUN' / 'plan.json'} {federation / 'work'} -o" in said


def test_a_private_run_is_not_told_to_go_on(finished, monkeypatch):
    private = finished.plan().change({"privacy.mechanism": "feddp", "privacy.noise_multiplier": 1.0})
    monkeypatch.setattr(Run, "plan", lambda self: private)
    assert "more rounds" not in "\n".join(outcomes.training_summary(finished))


def test_an_unfinished_run_predicts_with_a_notice(federation, finished, tmp_path, caplog):
    def stop(stage, done, total):
        if stage == "training" and done == total // 2:
            raise KeyboardInterrupt

    arguments = (finished.plan(), federation / "work", tmp_path / "RUN")
    with pytest.raises(KeyboardInterrupt):
        autofed.train(*arguments, device="cpu", simulation=True, progress=stop)
    scan = federation / "sites" / "alpha" / "imagesTr" / "alpha_000_0000.nii.gz"
    autofed.predict(tmp_path / "RUN", scan, tmp_path / "OUT", mirroring=False)
    assert "is not finished (fold all has finished 1 of 3 rounds): what predicts is an early model" in caplog.text
    caplog.clear()
    autofed.predict(finished.folder, scan, tmp_path / "other", mirroring=False)
    assert "not finished" not in caplog.text


def test_pictures_are_drawn_once(federation, finished, tmp_path):
    from autofed import report

    scans = federation / "sites" / "alpha" / "imagesTr"
    said = []
    autofed.predict(finished.folder, scans, tmp_path, mirroring=False, say=said.append)
    assert said[0].startswith("what predicts: RUN/global fold 0 best round") and said[1].endswith(": 6 cases")
    pictures = report.draw_predictions(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in pictures}
    pictures[0].unlink()
    (tmp_path / f"{pictures[1].stem}.json").touch()  # as if it had been predicted anew
    assert report.draw_predictions(tmp_path) == pictures
    changed = [path for path in pictures if path.stat().st_mtime_ns != before[path]]
    assert changed == pictures[:2]


@pytest.mark.usefixtures("one_processor")
def test_the_command_says_what_to_do_next(federation, tmp_path, monkeypatch, capsys):
    settings = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    places = ("-o", tmp_path / "RUN", "--work", tmp_path / "work")
    code, text = call(monkeypatch, capsys, "run", federation, *places, "--hours", "0.01", "--device", "cpu", *settings)
    assert code == 0, text
    assert f"the plan is {tmp_path / 'RUN' / 'plan.json'}; preprocessed data and ledgers are in" in text
    assert f"next: autofed predict {tmp_path / 'RUN'} -i IMAGES -o OUT" in text and "then: autofed evaluate" in text
    assert json.loads((tmp_path / "RUN" / "options.json").read_text())["settings"] == SMALL
    code, text = call(monkeypatch, capsys, "run", federation, "-o", tmp_path / "RUN", "--hours", "3")
    assert code == 2 and "it was begun with hours 0.01, now hours is 3.0" in text

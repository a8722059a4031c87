"""What an earlier autofed left on disk is read, gone on with, and gives the same numbers: tests/data/written_before."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import autofed
from autofed import plans, report
from autofed.api import ledgers, private_fingerprint
from autofed.cli import app
from autofed.data import images
from autofed.errors import ValidationErrors
from autofed.federation.run_folder import Run
from autofed.files import read_json
from autofed.fingerprints import Fingerprint
from autofed.fingerprints.private import PrivateFingerprint
from autofed.inference.postprocessing import Postprocessing
from autofed.messages import from_bytes, load_groups, to_bytes
from autofed.preprocessing import open_store
from autofed.privacy.events import PrivacyEvent
from autofed.privacy.ledger import LedgerEntry, PrivacyLedger
from tests import trained_weights

BEFORE = Path(__file__).parent / "data" / "written_before"
WEIGHTS = read_json(BEFORE / "weights.json")
HERE = {"device": "cpu", "workers": 0}
TRAININGS = ("open", "private", "scaffold", "dcfed")


def unpacked(folder):
    """Everything that was written, with the times at which it was."""
    with tarfile.open(BEFORE / "example.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """The folder of everything that was written, for tests that only read it."""
    return unpacked(tmp_path_factory.mktemp("before"))


@pytest.fixture
def copied(tmp_path):
    """The same as a copy of one's own, for tests that go on with it."""
    return unpacked(tmp_path / "before")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def expected(folder):
    return read_json(folder / "expected.json")


# --- plans, fingerprints, prepared data


@pytest.mark.parametrize("training", TRAININGS)
def test_a_plan_is_the_same_plan(before, tmp_path, training):
    path = before / training / "plan.json"
    plan = plans.load(path)
    assert [plan.digest(), plan.agreement.digest()] == read_json(before / "plans.json")[training]
    plan.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    explained = CliRunner().invoke(app, ["plan", str(path), "--explain"], env={"COLUMNS": "200"})
    assert explained.exit_code == 0, explained.output
    assert all(reason.field in explained.stdout for reason in plan.reasons)


@pytest.mark.parametrize("site", ["alpha", "bravo"])
def test_a_fingerprint_is_what_is_counted_today(before, tmp_path, site):
    handed_over = before / "open" / f"{site}.json"
    assert Fingerprint.load(handed_over) == autofed.fingerprint(before / "open" / "raw" / "sites" / site)
    Fingerprint.load(handed_over).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == handed_over.read_bytes()


@pytest.mark.parametrize("site", ["alpha", "bravo"])
def test_a_noised_fingerprint_is_handed_out_again_and_not_charged_again(copied, tmp_path, site):
    folder, ledger = copied / "private", copied / "private" / "work" / site / "ledger.jsonl"
    charged = ledger.read_bytes()
    private_fingerprint(folder / "raw" / "sites" / site, tmp_path / "again.json", work=folder / "work", epsilon=8.0)
    assert (tmp_path / "again.json").read_bytes() == (folder / f"{site}.json").read_bytes()
    assert (
        PrivateFingerprint.load(folder / f"{site}.json").noise_multiplier
        == PrivateFingerprint.load(tmp_path / "again.json").noise_multiplier
    )
    assert ledger.read_bytes() == charged


@pytest.mark.parametrize("training", TRAININGS)
def test_prepared_data_are_not_prepared_again(copied, tmp_path, training):
    folder = copied / training
    plan, sites = plans.load(folder / "plan.json"), sorted((folder / "raw" / "sites").iterdir())
    files = {path: path.stat().st_mtime_ns for path in folder.glob("work/*/*/*/*")}
    assert autofed.preprocess(plan, sites, folder / "work") == {"alpha": 0, "bravo": 0}
    assert files and files == {path: path.stat().st_mtime_ns for path in folder.glob("work/*/*/*/*")}
    autofed.preprocess(plan, sites, tmp_path / "work")
    for site in plan.agreement.patients:
        stored, anew = (open_store(work, site, plan.local) for work in (folder / "work", tmp_path / "work"))
        assert stored.patients == anew.patients and stored.folders.keys() == anew.folders.keys()
        for case in stored.folders:
            assert np.allclose(stored.image(case)[:], anew.image(case)[:], atol=1e-5)
            assert np.array_equal(stored.label(case)[:], anew.label(case)[:])
            assert all(np.array_equal(at, anew.locations(case)[key]) for key, at in stored.locations(case).items())


# --- runs


def test_a_run_predicts_the_labels_that_it_predicted(before, tmp_path):
    folder = before / "open"
    run = Run(folder / "run")
    assert run.models() == ["global"] and run.folds() == ["0", "all"]
    assert [member.name for member in run.members()] == ["run/global round 2", "run/global round 3"]
    assert run.postprocessing() == Postprocessing.load(folder / "run" / "postprocessing.json")
    assert set(run.held_out("0")) == {"organ", "tumour"} and run.left_out("all") == {}
    written = autofed.predict(run.folder, folder / "raw" / "test" / "imagesTs", tmp_path / "out", device="cpu")
    for about in written:
        for what, close in (("", 0), ("_entropy", 1e-4), ("_mutual_information", 1e-4)):
            name = f"{about.stem}{what}.nii.gz"
            now, then = (images.read(at / name) for at in (tmp_path / "out", folder / "predictions"))
            assert now.geometry == then.geometry and np.allclose(now.array, then.array, rtol=0, atol=close), name
        now, then = (read_json(at / about.name) for at in (tmp_path / "out", folder / "predictions"))
        assert now.keys() == then.keys()
        same = ("structures", "members", "plan", "weights", "files", "labels", "mirroring", "postprocessing")
        assert {key: now[key] for key in same} == {key: then[key] for key in same}
    best = autofed.predict(
        run.folder, folder / "raw" / "test" / "imagesTs", tmp_path / "best", folds=["0"], device="cpu"
    )
    assert len(best) == 2


def test_a_run_that_was_cut_off_comes_to_the_end_that_it_came_to(copied, one_thread):
    """It goes on with forgotten digits of messages, the sites' control variates and the moving average."""
    folder = copied / "scaffold"
    run = autofed.train(folder / "plan.json", folder / "work", folder / "run", resume=True, **HERE)
    for name in ("shared.safetensors", "kept.safetensors"):
        now, then = (load_groups(at / name)[0] for at in (run.fold_folder("all") / "round_00003", folder / "end"))
        assert {group: list(arrays) for group, arrays in now.items()} == {g: list(arrays) for g, arrays in then.items()}
        for group, arrays in then.items():
            for array in arrays:
                assert np.allclose(now[group][array], arrays[array], rtol=0, atol=1e-4), (group, array)
                if is_the_same_machine():
                    assert now[group][array].tobytes() == arrays[array].tobytes(), (group, array)


def test_a_run_at_its_end_is_given_more_rounds(copied):
    folder = copied / "open"
    longer = {"rounds": 4, "folds": ["all", "0"], "resume": True}
    run = autofed.train(folder / "plan.json", folder / "work", folder / "run", **longer, **HERE)
    assert run.finished("all") == run.finished("0") == 4 and run.plan().agreement.training.extended == (3,)


def test_models_of_sites_and_a_student_are_read_and_learn_on(copied, tmp_path):
    folder = copied / "dcfed"
    run = Run(folder / "run")
    assert run.models() == expected(folder)["models"] == ["alpha", "bravo", "student"]
    for model in run.models():
        autofed.predict(run.folder, folder / "raw" / "test" / "imagesTs", tmp_path / model, model=model, device="cpu")
    public = folder / "raw" / "public" / "imagesTr"
    made = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps({**made, "public": str(public)}))  # the images were moved with it
    agreed = run.agreed("all")
    autofed.train(folder / "run" / "plan.json", folder / "work", run.folder, resume=True, rounds=4, **HERE)
    assert run.finished("all") == 4 and run.agreed("all").keys() == agreed.keys()


# --- ledgers


def test_a_ledger_tells_the_same_epsilon_and_is_gone_on_with(copied):
    folder = copied / "private"
    for site, then in expected(folder).items():
        path = folder / "work" / site / "ledger.jsonl"
        ledger, lines = PrivacyLedger.existing(path), path.read_bytes()
        assert ledger.epsilon() == pytest.approx(then["epsilon"], rel=1e-9)
        assert ledger.counted() == pytest.approx(then["counted"], rel=1e-9)
        assert len(ledger.charges()) == then["charges"] and ledger.opening.ceiling_epsilon == 8.0
        assert ledgers.ledger_statement(ledger).epsilon == ledger.epsilon()
        for charge in ledger.charges():
            ledger.charge(charge)  # paid for already
        assert path.read_bytes() == lines
        event = PrivacyEvent(mechanism="dp-sgd", steps=1, noise_multiplier=1000.0, sampling_rate=0.1)
        ledger.charge(LedgerEntry(run="1e" * 16, round=1, question="train", agreement="a", events=(event,)))
        assert path.read_bytes().startswith(lines) and len(ledger.charges()) == then["charges"] + 1
        with pytest.raises(ValidationErrors, match="the ceiling of epsilon 8"):
            loud = event.model_copy(update={"noise_multiplier": 0.1, "sampling_rate": 1.0})
            ledger.charge(LedgerEntry(run="2e" * 16, round=1, question="train", agreement="a", events=(loud,)))


def test_an_answer_that_was_charged_and_cut_off_is_given_and_not_charged_again(copied):
    folder = copied / "private"
    run = autofed.train(folder / "plan.json", folder / "work", folder / "run", resume=True, **HERE)
    assert run.finished("all") == 3 and run.left_out("all") == {}
    for site, then in expected(folder).items():
        ledger = PrivacyLedger.existing(folder / "work" / site / "ledger.jsonl")
        charges = ledger.charges()
        assert [charge.run == "census" for charge in charges] == [True, False, False, False]
        assert then["epsilon"] <= ledger.epsilon() <= 8.0
    assert {site: then["charges"] for site, then in expected(folder).items()} == {"alpha": 4, "bravo": 3}
    assert any("alpha: this run cost epsilon" in line for line in ledgers.of_run(run, folder / "work"))


# --- predictions


def test_predictions_are_scored_and_shown(copied, tmp_path):
    folder = copied / "open"
    written_at = Path(read_json(folder / "predictions" / "prediction.json")["runs"][0]).parents[1]
    for path in folder.glob("predictions/*.json"):  # the scans were moved with them
        path.write_text(path.read_text().replace(str(written_at), str(copied)))
    references = folder / "raw" / "test" / "labelsTs"
    scores = autofed.evaluate(folder / "predictions", references, tmp_path / "report.json")
    assert scores.mean.dice == pytest.approx(expected(folder)["dice"], abs=1e-6)
    assert read_json(tmp_path / "report.json") == read_json(folder / "predictions" / "report.json")
    report.page(scores, folder / "predictions", references, [folder / "run"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "test_000" in page and page.count("data:image") >= 3


# --- messages


def test_messages_are_read_and_written_to_the_byte(before):
    then = expected(before / "messages")
    files = {path.stem: path for path in sorted(before.glob("messages/*.bin"))}
    assert files.keys() == then.keys()
    for name, path in files.items():
        message = from_bytes(path.read_bytes())
        words = {"task" if k == "question" else k: v for k, v in then[name].items() if k != "public"}
        assert trained_weights.in_words(message) == words, name
        assert to_bytes(message) == path.read_bytes(), name


@pytest.mark.parametrize("training", TRAININGS)
def test_answers_of_sites_are_read_and_written_to_the_byte(before, training):
    answers = sorted(before.glob(f"{training}/run/sites/*/*/releases/*.bin"))
    assert answers and all(to_bytes(from_bytes(path.read_bytes())) == path.read_bytes() for path in answers)


# --- weights


def is_the_same_machine():
    return trained_weights.machine() == WEIGHTS["machine"]


def test_every_algorithm_is_among_the_trainings():
    assert WEIGHTS["weights"].keys() == trained_weights.trainings().keys()


@pytest.mark.parametrize("training", WEIGHTS["weights"])
def test_a_training_ends_with_the_same_weights(ground, tmp_path, training):
    if not is_the_same_machine():
        pytest.skip(f"sums round as on {WEIGHTS['machine']}, and this is {trained_weights.machine()}")
    assert trained_weights.train(training, ground, tmp_path) == WEIGHTS["weights"][training]

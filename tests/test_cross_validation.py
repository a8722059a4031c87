"""Folds from end to end: who is held out, what is scored, which weights become the model, and that it all resumes."""

import errno
import json
import shutil
from functools import partial

import numpy as np
import pytest

import autofed
from autofed import files
from autofed.errors import ValidationErrors
from autofed.federation import checkpoints, metrics, rounds
from autofed.federation.model_selection import best_round
from autofed.federation.run_folder import Run
from autofed.inference.postprocessing import Postprocessing
from autofed.inference.validation import patch_dice
from autofed.messages import load_groups
from autofed.privacy.ledger import PrivacyLedger
from tests.equality import same_arrays
from tests.synthetic import ORGAN_AND_TUMOUR, make_site

SMALL = {"training.batch_size": 2, "training.steps_per_round": 2, "training.rounds": 4, "learning_rate": 0.05}
CASES = {"alpha": 6, "bravo": 3}


class Ground:
    """Two sites, of which one is too small to hold anybody out, a plan and prepared data."""

    def __init__(self, root):
        self.root = root
        self.sites = [make_site(root / "raw" / n, cases=c, labels=ORGAN_AND_TUMOUR) for n, c in CASES.items()]
        stages = len(autofed.plan(self.sites, hours=0.01, device="cpu").local.network.features)
        settings = {**SMALL, "network.features": [4] * stages, "training.validate_every": 1}
        self.plan = autofed.plan(self.sites, root / "plan.json", hours=0.01, device="cpu", settings=settings)
        autofed.preprocess(self.plan, self.sites, root / "work")

    def train(self, run, made=None, **wanted):
        return autofed.train(made or self.plan, self.root / "work", run, device="cpu", **wanted)


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground(tmp_path_factory.mktemp("folds"))


@pytest.fixture(scope="module")
def folds(ground):
    """Two folds of one run."""
    return ground.train(ground.root / "folds", folds=("0", "3"))


def weights(run, fold, round):
    return checkpoints.load(run.fold_folder(fold), round).shared["weights"]


class Enough(KeyboardInterrupt):
    """Raised by a progress that has seen enough."""


def stop_at_the_fifth_step(stage, done, total):
    if stage == "training" and done == 5:
        raise Enough


def test_each_fold_holds_out_others_and_a_small_site_nobody(folds):
    sides = {
        (site, fold): json.loads((folds.site_folder(site, fold) / "split.json").read_text())
        for site in CASES for fold in ("0", "3")
    }  # fmt: skip
    for fold in ("0", "3"):
        assert sides["bravo", fold] == {"train": [f"bravo_00{i}" for i in range(3)], "validation": []}
        assert len(sides["alpha", fold]["train"]) + len(sides["alpha", fold]["validation"]) == 6
    assert not set(sides["alpha", "0"]["validation"]) & set(sides["alpha", "3"]["validation"])


def test_scores_are_noted_and_the_best_round_is_kept(ground, folds):
    for fold in ("0", "3"):
        folder = folds.fold_folder(fold)
        lines = metrics.read(folder)
        assert [line["round"] for line in lines] == [1, 2, 3, 4]
        assert all(set(line["sites"]["alpha"]["dice"]) <= {"organ", "tumour"} for line in lines)
        assert all("dice" not in line["sites"]["bravo"] for line in lines)
        found = best_round(metrics.scores(folder))
        groups, words = load_groups(checkpoints.best_path(folder))
        assert words == found.words()
        if found.round in checkpoints.saved_rounds(folder):
            assert same_arrays(groups["weights"], weights(folds, fold, found.round))


def test_the_score_is_that_of_the_weights_of_its_round(ground, folds):
    from autofed.preprocessing import open_store

    held = json.loads((folds.site_folder("alpha", "0") / "split.json").read_text())["validation"]
    store = open_store(ground.root / "work", "alpha", ground.plan.local).only(held)
    found = patch_dice(weights(folds, "0", 4), store, ground.plan, 1)
    said = metrics.read(folds.fold_folder("0"))[-1]["sites"]["alpha"]["dice"]
    assert said == pytest.approx(found, abs=1e-6)


def test_predict_ensembles_the_folds(ground, folds, tmp_path):
    names = [member.name for member in folds.members()]
    assert len(names) == 2 and "fold 0 best round" in names[0] and "fold 3 best round" in names[1]
    assert len(folds.members(folds=["3"])) == 1
    with pytest.raises(ValidationErrors, match="fold 1 was not trained; choose --fold from: 0, 3"):
        folds.members(folds=["1"])
    image = np.random.default_rng(0).normal(size=(16, 24, 20)).astype(np.float32)
    one = [autofed.predict(folds.folder, image, spacing_mm=(1, 1, 1), folds=[f], mirroring=False) for f in ("0", "3")]
    both = autofed.predict(folds.folder, image, spacing_mm=(1, 1, 1), mirroring=False)
    assert both.members == 2 and all(o.members == 1 for o in one)
    assert not np.array_equal(one[0].entropy, one[1].entropy) and both.mutual_information.max() > 0


def test_whole_cases_are_scored_once_and_decide_the_postprocessing(ground, folds):
    table = json.loads((folds.fold_folder("0") / "validation.json").read_text())["sites"]
    assert set(table) == {"alpha"} and set(table["alpha"]) == {"organ", "tumour"}
    held = json.loads((folds.site_folder("alpha", "0") / "split.json").read_text())["validation"]
    own = json.loads((folds.site_folder("alpha", "0") / "validation.json").read_text())
    assert sorted(own) == sorted(held)
    row = table["alpha"]["organ"]
    assert row["dice"] == pytest.approx(np.mean([case["organ"] for case in own.values()]), abs=1e-3)
    assert isinstance(folds.postprocessing(), Postprocessing)
    assert folds.held_out("0")["organ"] == pytest.approx(row["dice"], abs=1e-3) and folds.held_out("all") == {}


def test_what_the_runs_found_is_done_to_every_prediction(ground, folds):
    image = np.random.default_rng(0).normal(size=(16, 24, 20)).astype(np.float32)
    wanted = {"spacing_mm": (1, 1, 1), "mirroring": False, "folds": ["0"]}
    before = folds.postprocessing()
    plain = autofed.predict(folds.folder, image, postprocessing=False, **wanted)
    chosen = Postprocessing(foreground=True, structures=("tumour",))
    try:
        folds.save_postprocessing(chosen)
        found = autofed.predict(folds.folder, image, **wanted)
    finally:
        folds.save_postprocessing(before)
    assert np.array_equal(found.labels, chosen.apply(plain.labels, ORGAN_AND_TUMOUR))
    assert not np.array_equal(found.labels, plain.labels)


@pytest.mark.parametrize("algorithm", ["fedavg", "local", "pooled"])
def test_a_fold_that_is_broken_off_resumes_to_the_bit(ground, tmp_path, algorithm):
    made = ground.plan.change({"training.rounds": 3, "training.ema": 0.6, "training.snapshots": [2, 3]})
    whole = ground.train(tmp_path / "whole", made, folds=["1"], algorithm=algorithm)
    with pytest.raises(Enough):
        ground.train(tmp_path / "broken", made, folds=["1"], algorithm=algorithm, progress=stop_at_the_fifth_step)
    broken = ground.train(tmp_path / "broken", made, folds=["1"], algorithm=algorithm, resume=True)
    for path in sorted(whole.folder.rglob("*.safetensors")):
        ours = load_groups(path)
        theirs = load_groups(broken.folder / path.relative_to(whole.folder))
        assert ours[1] == theirs[1] and ours[0].keys() == theirs[0].keys(), path
        assert all(same_arrays(ours[0][g], theirs[0][g]) for g in ours[0] if ours[0][g]), path
    names = [m.name for m in whole.members(None if algorithm != "local" else "alpha")]
    assert len(names) == 1 and "best round" in names[0]


@pytest.mark.parametrize("interrupted", ["_validate", "_keep_best"])
@pytest.mark.parametrize("algorithm", ["fedavg", "fedbn"])
def test_a_round_that_was_merged_is_scored_and_not_trained_again(ground, tmp_path, monkeypatch, algorithm, interrupted):
    """Cut off when the sites have trained, so that nobody who was late can change what the scores are of."""
    made = ground.plan.change({"training.rounds": 3, "training.snapshots": [3]})
    whole = ground.train(tmp_path / "whole", made, folds=["1"], algorithm=algorithm)
    real = getattr(rounds, interrupted)

    def dies_in_round_two(course, state):
        if state.round == 2:
            raise Enough
        return real(course, state)

    with monkeypatch.context() as patch:
        patch.setattr(rounds, interrupted, dies_in_round_two)
        with pytest.raises(Enough):
            ground.train(tmp_path / "broken", made, folds=["1"], algorithm=algorithm)
    broken = Run(tmp_path / "broken")
    assert broken.finished("1") == 2
    ground.train(tmp_path / "broken", made, folds=["1"], algorithm=algorithm, resume=True)
    lines = [[{**line, "seconds": 0} for line in metrics.read(run.fold_folder("1"))] for run in (whole, broken)]
    assert lines[0] == lines[1] and len(lines[0]) == 3
    best = [checkpoints.best_weights(run.fold_folder("1")) for run in (whole, broken)]
    assert same_arrays(*best) if algorithm == "fedavg" else best == [{}, {}]
    ledger = PrivacyLedger(ground.root / "work" / "alpha" / "ledger.jsonl", "alpha")
    name = f"{broken.identity().id}-fold-1"
    assert [c.round for c in ledger.charges() if c.run == name and c.question == "train"] == [1, 2, 3]


def test_models_of_a_site_of_its_own_are_chosen_by_the_site(ground, tmp_path):
    run = ground.train(tmp_path / "local", folds=["0"], algorithm="local")
    assert run.models() == ["alpha", "bravo"]
    (alpha,) = run.members("alpha")
    assert "best round" in alpha.name
    assert len(run.members("bravo")) == 3  # nobody was held out there: the snapshots
    assert not checkpoints.best_path(run.fold_folder("0")).is_file()
    scores = json.loads((run.site_folder("alpha", "0") / "memory" / "scores.json").read_text())
    assert (
        best_round({int(r): s for r, s in scores.items()}).round
        == load_groups(run.site_folder("alpha", "0") / "memory" / "best.safetensors")[1]["round"]
    )


def test_the_moving_average_is_the_model(ground, tmp_path):
    run = ground.train(tmp_path / "run", ground.plan.change({"training.ema": 0.9, "training.snapshots": [1, 2, 3, 4]}))
    mean = np.mean([weights(run, "all", r)["heads.0.conv.conv.bias"] for r in (1, 2, 3, 4)], axis=0)
    found = run.members()[-1].read()["heads.0.conv.conv.bias"]
    assert np.allclose(found, mean, atol=1e-7) and not np.array_equal(found, weights(run, "all", 4))


@pytest.mark.parametrize(
    ("folds", "says"),
    [
        (["x"], "there is no fold 'x'; write all, cv"),
        (["0", "x", "-1"], "2 problems|no fold '-1'"),
        (["7"], "there is no fold 7; write 0 to 4"),
    ],
)
def test_folds_that_cannot_be_are_refused(ground, tmp_path, folds, says):
    with pytest.raises(ValidationErrors, match=says):
        ground.train(tmp_path / "run", folds=folds)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_federation_of_small_sites_cannot_hold_out(tmp_path):
    sites = [make_site(tmp_path / "raw" / n, cases=2) for n in ("alpha", "bravo")]
    stages = len(autofed.plan(sites, hours=0.01, device="cpu").local.network.features)
    made = autofed.plan(sites, hours=0.01, device="cpu", settings={**SMALL, "network.features": [4] * stages})
    autofed.preprocess(made, sites, tmp_path / "work")
    with pytest.raises(ValidationErrors, match="no site holds out a patient in fold 0.*write --fold all"):
        autofed.train(made, tmp_path / "work", tmp_path / "run", folds=["0"], device="cpu")


def test_a_split_that_the_site_wrote_down_is_taken_and_must_not_change(tmp_path):
    sites = [make_site(tmp_path / "raw" / "alpha", cases=3)]
    split = [{"train": ["alpha_000", "alpha_001"], "val": ["alpha_002"]}]
    (sites[0] / "splits_final.json").write_text(json.dumps(split))
    stages = len(autofed.plan(sites, hours=0.01, device="cpu").local.network.features)
    made = autofed.plan(sites, hours=0.01, device="cpu", settings={**SMALL, "network.features": [4] * stages})
    arguments = (made, tmp_path / "work", tmp_path / "run")
    autofed.preprocess(made, sites, tmp_path / "work")
    run = autofed.train(*arguments, folds=["0"], device="cpu")
    found = json.loads((run.site_folder("alpha", "0") / "split.json").read_text())
    assert found == {"train": ["alpha_000", "alpha_001"], "validation": ["alpha_002"]}
    (sites[0] / "splits_final.json").write_text(json.dumps([{"train": ["alpha_002"], "val": ["alpha_000"]}]))
    autofed.preprocess(made, sites, tmp_path / "work")
    with pytest.raises(ValidationErrors, match="the patients of alpha are not split as when fold 0 was begun"):
        autofed.train(*arguments, folds=["0"], resume=True, device="cpu")


# --- going on for longer


def test_more_rounds_go_on_from_where_it_was_and_score_whole_cases_again(ground, tmp_path):
    made, first = ground.plan.change({"training.rounds": 2}), {"folds": ["0"], "resume": True}
    run = ground.train(tmp_path / "run", made, folds=["0"])
    last, validation = weights(run, "0", 2), run.fold_folder("0") / "validation.json"
    longer = ground.train(tmp_path / "run", made, rounds=6, **first)
    assert longer.plan().agreement.training.rounds == 6 and longer.plan().agreement.training.extended == (2,)
    assert longer.finished("0") == 6 and len(metrics.read(longer.fold_folder("0"))) == 6
    assert not same_arrays(last, weights(longer, "0", 6))
    assert json.loads(validation.read_text())["rounds"] == 6
    again = ground.train(tmp_path / "run", made, rounds=6, **first)  # what was extended once is so
    assert again.plan() == longer.plan()
    anew = ground.train(tmp_path / "anew", longer.plan(), folds=["0"])
    assert same_arrays(weights(anew, "0", 6), weights(longer, "0", 6))
    assert metrics.scores(anew.fold_folder("0")) == metrics.scores(longer.fold_folder("0"))


def test_only_a_training_at_its_end_is_given_more_rounds(ground, tmp_path):
    made = ground.plan.change({"training.rounds": 2})
    with pytest.raises(Enough):
        ground.train(tmp_path / "run", made, progress=stop_at_the_fifth_step)
    with pytest.raises(
        ValidationErrors, match="fold all has finished 1 of 2 rounds; finish it with --resume --fold all"
    ):
        ground.train(tmp_path / "run", made, rounds=4, resume=True)
    ground.train(tmp_path / "run", made, rounds=2, resume=True)  # the rounds that it has are no longer training
    with pytest.raises(ValidationErrors, match="1 rounds were asked for, 2 are planned; expected more"):
        ground.train(tmp_path / "run", made, rounds=1, resume=True)
    with pytest.raises(ValidationErrors, match="--init comes too late"):
        ground.train(tmp_path / "run", made, rounds=4, resume=True, init=tmp_path / "run")


# --- which weights count


def test_a_training_that_has_not_come_to_its_end_is_not_predicted_with(ground, tmp_path):
    made = ground.plan.change({"training.rounds": 2})
    run = ground.train(tmp_path / "run", made, folds=["0"])
    with pytest.raises(Enough):
        ground.train(tmp_path / "run", made, resume=True, progress=stop_at_the_fifth_step)
    assert run.folds() == ["0", "all"]
    assert ["fold 0" in member.name for member in run.members()] == [True]
    assert len(run.members(folds=["all"])) == 1


def test_weights_that_have_seen_the_held_out_patients_are_no_start(ground, folds, tmp_path):
    with pytest.raises(ValidationErrors, match="has trained on patients that fold 1 holds out"):
        ground.train(tmp_path / "run", folds=["1"], init=folds.folder)
    with pytest.raises(ValidationErrors, match="no common model that was trained on all patients; name a file in it"):
        ground.train(tmp_path / "run", init=folds.folder)
    assert not (tmp_path / "run").exists()
    made = ground.plan.change({"training.rounds": 1, "learning_rate": 1e-12})
    best = checkpoints.best_path(folds.fold_folder("0"))
    run = ground.train(tmp_path / "run", made, folds=["0"], init=best)
    given = load_groups(best)[0]["weights"]
    assert all(np.allclose(given[n], w, atol=1e-6) for n, w in weights(run, "0", 1).items())


def test_postprocessing_is_decided_also_if_the_run_was_killed_before_it(ground, folds):
    (folds.folder / "postprocessing.json").unlink()
    again = ground.train(folds.folder, folds=["0", "3"], resume=True)
    assert (again.folder / "postprocessing.json").is_file()


def test_folds_draw_each_by_themselves(ground, tmp_path):
    """The same patients train in two folds of a site that holds out nobody, and yet other patches are drawn."""
    made = ground.plan.change({"training.rounds": 1})
    run = ground.train(tmp_path / "run", made, folds=["00", "0", "1"])
    losses = [metrics.read(run.fold_folder(f))[0]["sites"]["bravo"]["loss"] for f in ("0", "1")]
    assert losses[0] != losses[1] and run.folds() == ["0", "1"]


# --- what people look at


def test_the_curves_are_there_for_tensorboard_once_each(ground, folds):
    ground.train(folds.folder, folds=["0"], resume=True)  # the file is written anew from the lines
    (path,) = (folds.fold_folder("0") / "tensorboard").iterdir()
    written = path.read_bytes()
    assert written.count(b"loss/alpha") == written.count(b"dice/alpha/organ") == 4
    assert written.count(b"loss/bravo") == 4 and b"dice/bravo" not in written


# --- a full disk


@pytest.fixture(scope="module")
def short(ground):
    """One fold of two rounds, never broken off."""
    return ground.train(ground.root / "short", ground.plan.change({"training.rounds": 2}), folds=["0"])


@pytest.mark.parametrize("after", range(1, 26, 6))
def test_a_full_disk_ends_the_run_and_leaves_the_last_round_whole(ground, short, tmp_path, monkeypatch, after):
    """The disk is full from some write on; once there is room again the run goes on as if nothing had happened."""
    written, whole = [], files.whole_file

    def full(path):
        written.append(path)
        if len(written) > after:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return whole(path)

    arguments = {"folds": ["0"], "made": short.plan()}
    with monkeypatch.context() as patched:
        patched.setattr(files, "whole_file", full)
        with pytest.raises((ValidationErrors, OSError), match="disk-full|No space left"):
            ground.train(tmp_path / "full", **arguments)
    run = Run(tmp_path / "full")
    for path in run.folder.rglob("*.safetensors"):
        load_groups(path)  # whole, each of them
    found = ground.train(run.folder, **arguments, resume=run.exists)
    assert same_arrays(weights(found, "0", 2), weights(short, "0", 2))


@pytest.fixture(scope="module")
def private_run(tmp_path_factory):
    """One fold of a private plan that shares its scores."""
    ground = Ground(tmp_path_factory.mktemp("private"))
    sides = [{"train": [f"alpha_{i:03d}" for i in range(4)], "val": ["alpha_004", "alpha_005"]}]
    (ground.root / "work" / "alpha" / "splits.json").write_text(json.dumps(sides))
    (ground.root / "work" / "bravo" / "splits.json").write_text(
        json.dumps([{"train": [f"bravo_{i:03d}" for i in range(3)], "val": []}])
    )
    named = {"privacy.mechanism": "dp-sgd", "score_noise": 3.0}
    ground.plan = autofed.api.change(ground.plan, None, named, epsilon=8.0, delta=1e-5)
    return ground, ground.train(ground.root / "run", folds=("0",))


def test_a_private_fold_tells_its_scores_with_noise_and_chooses_nothing_by_them(private_run):
    ground, run = private_run
    told = json.loads((run.fold_folder("0") / "validation.json").read_text())["sites"]
    own = json.loads((run.site_folder("alpha", "0") / "validation.json").read_text())
    assert set(told) == {"alpha", "bravo"} and len(own) == 2  # also the site that holds nobody out
    noised = [n for site in told.values() for row in site.values() for n in (row["sums"][0], row["cases"][0])]
    assert len(noised) == 8 and all(n == 0 or n != round(n) for n in noised)
    assert all(0 <= dice <= 1 for dice in run.held_out("0").values())
    assert not (run.folder / "postprocessing.json").exists()
    assert [member.name for member in run.members()] and "best" not in run.members()[0].name
    assert not list(run.folder.rglob("best.safetensors"))
    spent = PrivacyLedger.existing(ground.root / "work" / "alpha" / "ledger.jsonl")
    assert [charge.question for charge in spent.charges()] == ["train"] * 4 + ["verify"]
    assert 7.5 < spent.epsilon() <= 8.0


def test_a_second_fold_of_a_private_run_is_refused(private_run):
    ground, run = private_run
    for folds in (("1",), ("0", "1"), ("cv",)):
        with pytest.raises(ValidationErrors, match="k folds spend a patient's privacy"):
            ground.train(run.folder, folds=folds, resume=True)


def test_a_spent_ledger_ends_the_next_run_before_anything_leaves(private_run, tmp_path):
    ground, _ = private_run
    with pytest.raises(ValidationErrors, match="alpha: of its ceiling of epsilon 9.*this plan would pass"):
        ground.train(tmp_path / "again")
    with pytest.raises(ValidationErrors, match="this plan would pass"):
        ground.train(tmp_path / "open", ground.plan.change({"privacy.mechanism": "none"}))
    assert not (tmp_path / "again").exists() and not (tmp_path / "open").exists()
    ground.train(tmp_path / "tried", simulation=True)  # ledgers of its own


def test_a_private_plan_is_not_given_other_rounds_in_passing(private_run, tmp_path):
    ground, run = private_run
    with pytest.raises(ValidationErrors, match="write autofed plan PLAN --set training.rounds=9"):
        ground.train(tmp_path / "run", rounds=9)
    with pytest.raises(ValidationErrors, match="made for its rounds"):
        ground.train(run.folder, rounds=9, resume=True)


def test_a_simulation_stays_one_and_a_real_run_too(private_run, tmp_path):
    ground, run = private_run
    ground.train(tmp_path / "tried", simulation=True)
    with pytest.raises(ValidationErrors, match="begun as a simulation.*add --simulation"):
        ground.train(tmp_path / "tried", resume=True)
    with pytest.raises(ValidationErrors, match="begun on the sites' own ledgers; leave out --simulation"):
        ground.train(run.folder, folds=("0",), resume=True, simulation=True)
    with pytest.raises(ValidationErrors, match="leave out --device, --workers and --simulation"):
        autofed.train(ground.plan, None, tmp_path / "away", connection="net", simulation=True)


def test_what_a_start_has_told_of_the_same_patients_must_be_in_the_ledger(private_run, tmp_path):
    ground, _ = private_run
    for work in ("here", "elsewhere"):
        shutil.copytree(ground.root / "work", tmp_path / work)
        for ledger in (tmp_path / work).glob("*/ledger.jsonl"):
            ledger.unlink()
    made = ground.plan.change({"privacy.mechanism": "none"})
    train = partial(autofed.train, device="cpu")
    train(ground.plan, tmp_path / "here", tmp_path / "tried", simulation=True)
    with pytest.raises(ValidationErrors, match="is a simulation on patients of alpha, bravo"):
        train(ground.plan, tmp_path / "here", tmp_path / "next", init=tmp_path / "tried")
    train(made, tmp_path / "elsewhere", tmp_path / "open")
    with pytest.raises(ValidationErrors, match="was trained on patients of alpha, but .* has no record of it"):
        train(ground.plan, tmp_path / "here", tmp_path / "next", init=tmp_path / "open")
    train(
        ground.plan, tmp_path / "elsewhere", tmp_path / "next", init=tmp_path / "open"
    )  # epsilon is infinite, and said so
    assert PrivacyLedger.existing(tmp_path / "elsewhere" / "alpha" / "ledger.jsonl").epsilon() == np.inf


def test_a_private_training_that_was_cut_off_in_its_first_round_goes_on(private_run, tmp_path):
    """What it was charged for is not asked for again: the ceiling is what the whole costs, and no more."""
    ground, _ = private_run
    shutil.copytree(ground.root / "work", tmp_path / "work")
    for ledger in (tmp_path / "work").glob("*/ledger.jsonl"):
        ledger.unlink()
    train = partial(autofed.train, ground.plan, tmp_path / "work", tmp_path / "run", device="cpu")

    def stop(_, done, total):
        if done == 3:  # the first site has answered, the second is at work
            raise Enough

    with pytest.raises(Enough):
        train(progress=stop)
    assert not Run(tmp_path / "run").folds()
    assert train(resume=True).finished("all") == 4
    assert len(PrivacyLedger.existing(tmp_path / "work" / "alpha" / "ledger.jsonl").charges()) == 4

"""The audit: its arithmetic against published figures, and which mechanisms it lets through."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
from PIL import Image as Pillow
from typer.testing import CliRunner

from autofed import api
from autofed.api.public_images import with_image_digests
from autofed.auditing import canaries
from autofed.auditing.inversion import (
    fit_intensities,
    gradient_of,
    invert_gradient,
    paint_labels,
    reconstruction_metrics,
)
from autofed.auditing.label_attack import label_attack_score
from autofed.auditing.one_run import Trial, attack, audit, lower_bound, p_value
from autofed.cli import app
from autofed.data import open_dataset
from autofed.data.labels import Labels
from autofed.errors import ValidationErrors
from autofed.preprocessing import open_public, open_store, preprocess
from autofed.privacy import accounting
from autofed.privacy.adp_fl import Adaptive
from autofed.privacy.dpsgd import DPSGD
from autofed.privacy.feddp import FedDP
from autofed.training.network import build, weights_of
from tests.plans_made import small_plan
from tests.small_federation import private

RUN = CliRunner()
WIDE = {"features": [16, 16, 16]}


# --- the arithmetic


def test_published_figures():
    """Steinke et al. 2023, section 1: what so many right guesses certify at p < .05."""
    assert lower_bound(100, 100, 100, 0) == pytest.approx(3.5, abs=0.05)
    assert lower_bound(1000, 1000, 1000, 0) == pytest.approx(5.8, abs=0.05)
    assert lower_bound(9000, 9000, 9000, 0) == pytest.approx(8.0, abs=0.05)


def test_p_value_without_delta_is_that_of_coins():
    from scipy.stats import binomtest

    for guesses, right, epsilon in ((50, 40, 0.0), (50, 40, 1.0), (200, 150, 0.7), (3, 0, 2.0)):
        coin = 1 / (1 + np.exp(-epsilon))
        expected = binomtest(right, guesses, coin, alternative="greater").pvalue
        assert p_value(1000, guesses, right, epsilon, 0.0) == pytest.approx(expected, abs=1e-12)


def test_delta_and_abstaining_only_weaken_it():
    assert p_value(100, 50, 45, 1.0, 1e-3) > p_value(100, 50, 45, 1.0, 0.0)
    assert p_value(1000, 50, 45, 1.0, 1e-3) > p_value(100, 50, 45, 1.0, 1e-3)
    assert lower_bound(100, 80, 80, 1e-5) < lower_bound(100, 100, 100, 1e-5)
    assert lower_bound(100, 100, 100, 1e-5, 1e-3) < lower_bound(100, 100, 100, 1e-5)
    assert lower_bound(100, 100, 50, 0) == lower_bound(100, 0, 0, 0) == 0


def test_guesses_are_the_highest_and_the_lowest():
    trial = Trial(np.array([5.0, 1.0, 4.0, 2.0, 3.0]), np.array([True, False, False, True, True]))
    assert [trial.right(n) for n in (1, 2, 3, 4)] == [1, 2, 2, 2]


def test_chance_is_not_taken_for_knowledge():
    """Scores that know nothing: about 5 % of audits find something all the same, though three shares are tried."""
    generator = np.random.default_rng(0)
    trials = [Trial(generator.random(100), generator.random(100) < 0.5) for _ in range(200)]
    assert sum(trial.bound(1e-5).epsilon > 0 for trial in trials) <= 18


def test_randomised_response_is_bounded_at_its_own_epsilon():
    """Who tells the truth with probability 1 / (1 + exp(-eps)) is never refuted, and nearly reached."""
    generator, epsilon, found = np.random.default_rng(1), 1.5, []
    for _ in range(10):
        included = generator.random(1000) < 0.5
        truthful = generator.random(1000) < 1 / (1 + np.exp(-epsilon))
        found.append(Trial(np.where(included == truthful, 1.0, -1.0), included).bound(0.0, 1e-3).epsilon)
    assert max(found) <= epsilon < 1.5 * np.mean(found)


# --- mechanisms: fixed seeds, claims of at most 1.5, p < .001


@dataclass(frozen=True)
class Quiet(DPSGD):
    """Noise of a fiftieth of what is billed."""

    @property
    def gradient_noise(self):
        return self.noise_multiplier / 50


class QuietAdaptive(Adaptive):
    """None at all."""

    @property
    def gradient_noise(self):
        return 0.0


class QuietFedDP(FedDP):
    """An eighth of what is billed."""

    def cost(self, steps):
        (event,) = super().cost(steps)
        return (event.model_copy(update={"noise_multiplier": 8 * event.noise_multiplier}),)


HONEST = {
    "dp-sgd": DPSGD(150, 0.3, 2, 1.0, 5.0),
    "normalised": DPSGD(150, 0.3, 2, 0.1, 5.0, normalised=True),
    "adp": Adaptive(150, 0.3, 2, 1.0, 5.0, noise_ratio=0.8, rounds=4),
    "feddp": FedDP(1.0, 16.0, 2),
}
LIARS = {"dp-sgd": Quiet(150, 0.3, 2, 1.0, 5.0), "adp": QuietAdaptive(150, 0.3, 2, 1.0, 5.0, rounds=4),
         "feddp": QuietFedDP(1.0, 16.0 / 8, 2)}  # fmt: skip


def bound_and_claim(mechanism, seed=0):
    canaries_ = 400 if isinstance(mechanism, FedDP) else 150
    trial = attack(mechanism, rounds=4, steps=5, canaries=canaries_, generator=np.random.default_rng(seed))
    return trial.bound(1e-5, alpha=1e-3).epsilon, accounting.epsilon(trial.events, 1e-5)


@pytest.mark.parametrize("name", HONEST)
def test_a_mechanism_that_keeps_its_word_is_let_through(name):
    for seed in range(3):
        bound, claim = bound_and_claim(HONEST[name], seed)
        assert bound < claim < 1.5


@pytest.mark.parametrize("name", LIARS)
def test_too_little_noise_is_caught(name):
    bound, claim = bound_and_claim(LIARS[name])
    assert claim < 1.5 and claim < bound


def test_the_bound_comes_near_the_claim_where_one_step_tells_all():
    """A plain Gaussian mechanism on many canaries: the audit is an attack that is worth its name."""
    found = audit(DPSGD(4000, 1.0, 1, 1.0, 1.0), rounds=1, steps=1, delta=1e-5, canaries=4000,
                  generator=np.random.default_rng(0))  # fmt: skip
    assert 0.3 * found.claim < found.bound < found.claim


def test_too_few_canaries_are_refused():
    with pytest.raises(ValidationErrors, match="found 3 canaries; expected 10 or more"):
        audit(DPSGD(3, 1.0, 1, 1.0, 1.0), rounds=1, steps=1, delta=1e-5, canaries=3,
              generator=np.random.default_rng(0))  # fmt: skip


# --- plans: gradients and images


def made(mechanism="dp-sgd", noise=None, edge=16, **more):
    """A plan of pictures of 16 voxels an edge."""
    plan = small_plan(shape=(1, edge, edge), labels=1, **{"training.validate_every": 0, "training.rounds": 2, **more})
    return private(plan, mechanism, **({"noise_multiplier": noise} if noise else {}))


def test_command_line(tmp_path):
    made(**{"training.steps_per_round": 3}).save(tmp_path / "plan.json")
    done = RUN.invoke(app, ["audit", str(tmp_path / "plan.json"), "--canaries", "40", "-o", str(tmp_path / "a.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["mechanism"], found["canaries"], found["rounds"], found["steps"]) == ("dp-sgd", 40, 2, 3)
    assert f"epsilon {found['claim']:.3g} at delta" in done.output and "no proof" in done.output


def test_more_told_than_claimed_ends_with_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(DPSGD, "gradient_noise", property(lambda self: 0.0))
    plan = made(noise=12.0)
    plan.save(tmp_path / "plan.json")
    done = RUN.invoke(app, ["audit", str(tmp_path / "plan.json"), "--canaries", "100"])
    assert plan.agreement.privacy.epsilon < 1.5
    assert done.exit_code == 1 and "the claim is wrong" in done.output


def test_images_of_a_network_that_learns_them_by_heart_are_told_apart():
    """Without noise and long enough, wrong labels stay in the weights; they were drawn or not, as the coin said."""
    chosen = {**WIDE, "learning_rate": 0.1, "batch_size": 16, "training.momentum": 0.9}
    plan = made("none").change(chosen)
    generator = np.random.default_rng(0)
    planted = canaries.make_canaries(plan, 24, generator)
    from autofed import privacy

    seen = []

    def score(rounds):
        seen.extend(rounds)
        return canaries.loss_decrease_scores(plan, planted)(iter(seen))

    trial = canaries.attack(plan, privacy.find_mechanism(plan, 24), planted, 60, generator, score)
    exposed = replace(trial, scores=canaries.label_exposure_scores(plan, planted, seen[-1]))
    for found in (trial, exposed):
        assert found.scores[found.included].mean() > found.scores[~found.included].mean() + 0.05
        assert found.right(12) >= 10


def test_how_hard_a_picture_or_a_label_map_is_falls_out_of_the_score(monkeypatch):
    plan = made("none")
    planted = canaries.make_canaries(plan, 12, np.random.default_rng(0))
    generator, known, places = np.random.default_rng(1), np.zeros(12), np.arange(12)
    pictures, labels, known[3] = generator.random(12), generator.random(12), 0.1

    def losses(plan, canaries, weights, device, decoys):
        table = [pictures + labels[(places + turn) % 12] for turn in range(1 + decoys)]
        return np.array([table[0] - known, *table[1:]])

    monkeypatch.setattr(canaries, "_losses", losses)
    scores = canaries.label_exposure_scores(plan, planted, {})
    assert scores.argmax() == 3 and np.ptp(np.delete(scores, 3)) < 1e-9 and np.ptp(scores) > 0.05


def test_images_of_a_site_and_its_ledger(tmp_path, make_site):
    plan = made(sites=("alpha",), cases=12)
    preprocess(open_dataset(make_site("alpha", cases=12, dimension=2, shape=(20, 20))), plan.local, tmp_path / "work")
    plan = private(plan, "dp-sgd")
    found = api.audit(plan, tmp_path / "work" / "alpha", kind="image", canaries=50, device="cpu")
    assert (found.kind, found.canaries, found.unit) == ("image", 12, "patient")
    assert found.bound <= found.claim == plan.agreement.privacy.epsilon
    assert not list(tmp_path.glob("work/**/ledger*"))
    with pytest.raises(ValidationErrors, match="no site 'work' in the plan"):
        api.audit(plan, tmp_path / "work")


def test_canaries_of_a_site_are_its_images_with_other_labels(tmp_path, make_site):
    plan = made()
    preprocess(open_dataset(make_site("alpha", cases=3, dimension=2, shape=(16, 16))), plan.local, tmp_path)
    store = open_store(tmp_path, "alpha", plan.local)
    planted = canaries.make_canaries(plan, 9, np.random.default_rng(0), store)
    own = {store.image(case)[:].tobytes() for cases in store.patients.values() for case in cases}
    assert {image.tobytes() for image in planted.images.values()} == own
    for labels in planted.maps.values():
        assert set(np.unique(labels)) <= Labels.of(plan.agreement).values


# --- pseudo-labels


@pytest.fixture
def pictures(make_site):
    """A folder of public images."""
    return make_site("public", cases=3, dimension=2, shape=(20, 20))


@pytest.mark.parametrize("mechanism", ["none", "dp-sgd"])
def test_labels_on_the_command_line(tmp_path, pictures, mechanism, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    plan = made(mechanism)
    plan.save(tmp_path / "plan.json")
    wanted = ["--kind", "labels", "--public", str(pictures), "--canaries", "12", "-o", str(tmp_path / "a.json")]
    done = RUN.invoke(app, ["audit", str(tmp_path / "plan.json"), *wanted, "--device", "cpu", "--alpha", "1e-6"])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["kind"], found["canaries"], found["public"], found["bound"]) == ("labels", 12, 3, 0)
    assert found["claim"] == plan.agreement.privacy.epsilon
    assert "by the labels of 3 public images alone" in done.output
    assert ("Nothing is promised. This attack told nothing" if mechanism == "none" else "no proof") in done.output
    left = [path.name for path in (tmp_path / "scratch").iterdir()]
    assert [name for name in left if not name.startswith("torchinductor_")] == []  # torch's own, once in a process


def overhear(plan, planted, pictures, folder, *rounds):
    shown = open_public(pictures, with_image_digests(plan, pictures), folder)
    return label_attack_score(plan, planted, shown, folder)(iter(rounds))


def test_the_scores_follow_from_the_answers_alone(tmp_path, pictures):
    """Weights with no part in any answer (of a coarser head) have none in the scores; other answers give others."""
    plan = made("none", edge=32)
    planted = canaries.make_canaries(plan, 12, np.random.default_rng(0))
    weights = weights_of(build(plan.local.network, seed=1))
    unasked = {n: a + (n.startswith("heads.") and not n.startswith("heads.0.")) for n, a in weights.items()}
    assert any((unasked[n] != weights[n]).any() for n in weights)
    other = weights_of(build(plan.local.network, seed=2))
    first, second, third = (overhear(plan, planted, pictures, tmp_path, w) for w in (weights, unasked, other))
    assert np.array_equal(first, second) and not np.array_equal(first, third)


def test_the_model_that_is_asked_is_the_average_that_a_site_would_ask(tmp_path, pictures):
    plan = made("none")
    planted = canaries.make_canaries(plan, 10, np.random.default_rng(0))
    one, two = (weights_of(build(plan.local.network, seed=seed)) for seed in (1, 2))
    mean = {name: (one[name] + two[name]) / 2 for name in one}
    averaged = overhear(plan.change({"training.ema": 0.9}), planted, pictures, tmp_path, one, two)
    assert np.allclose(averaged, overhear(plan, planted, pictures, tmp_path, mean), atol=1e-3)
    assert not np.allclose(averaged, overhear(plan, planted, pictures, tmp_path, one, two), atol=1e-3)


def test_answers_that_are_no_numbers_are_no_audit(tmp_path, pictures):
    plan = made("none")
    broken = {name: array * np.nan for name, array in weights_of(build(plan.local.network, seed=1)).items()}
    with pytest.raises(ValidationErrors, match="NaN or infinite values; lower the learning rate"):
        overhear(plan, canaries.make_canaries(plan, 10, np.random.default_rng(0)), pictures, tmp_path, broken)


def test_what_is_wrong_with_an_audit_of_labels_is_said_at_once(tmp_path, pictures, make_site):
    with pytest.raises(ValidationErrors) as refused:
        api.audit(made("feddp"), tmp_path / "delta", kind="labels", canaries=3)
    told = "\n".join(refused.value.problems)
    assert len(refused.value.problems) == 4
    for said in ("no site 'delta'", "name a folder that holds them", "feddp has no protection", "found 3 canaries"):
        assert said in told
    with pytest.raises(ValidationErrors, match="--public: that is for --kind labels"):
        api.audit(made(), kind="image", public=pictures)
    agreed = with_image_digests(made(), make_site("others", cases=3, dimension=2, shape=(20, 20)))
    with pytest.raises(ValidationErrors, match="others_000, others_001, others_002 are agreed on but not here"):
        api.audit(agreed, kind="labels", public=pictures)


# --- gradient inversion


def test_inversion_finds_what_noise_hides():
    plan = small_plan(shape=(1, 16, 16), labels=1).change(WIDE)
    weights = weights_of(build(plan.local.network, seed=1))
    generator = np.random.default_rng(0)
    image = canaries.make_picture(plan, generator).reshape(1, 16, 16)
    label = (image[0] > 0).astype(np.int16)
    bare = gradient_of(image, label, weights, plan.local)
    length = np.sqrt(sum(float((part**2).sum()) for part in bare.values()))
    noised = {n: -part + length * generator.normal(size=part.shape).astype(np.float32) for n, part in bare.items()}
    seen = reconstruction_metrics(
        invert_gradient({n: -part for n, part in bare.items()}, weights, label, plan.local, iterations=120), image
    )
    hidden = reconstruction_metrics(invert_gradient(noised, weights, label, plan.local, iterations=60), image)
    blank = reconstruction_metrics(np.zeros_like(image), image)
    known = reconstruction_metrics(paint_labels(label, image), image)
    assert seen.psnr > known.psnr > blank.psnr + 3 and seen.ssim > 0.3
    assert hidden.psnr < blank.psnr + 1


def test_likeness_is_blind_to_brightness_and_contrast():
    generator = np.random.default_rng(0)
    image = generator.normal(size=(2, 12, 12)).astype(np.float32)
    assert reconstruction_metrics(image, image).ssim == pytest.approx(1, abs=1e-4)
    assert np.allclose(fit_intensities(5 - 3 * image, image), image, atol=1e-5)
    assert (
        reconstruction_metrics(generator.normal(size=image.shape), image).psnr
        < 20
        < reconstruction_metrics(image * 7 + 1, image).psnr
    )


def test_inversion_picture(tmp_path):
    made().save(tmp_path / "plan.json")
    done = RUN.invoke(
        app, ["audit", str(tmp_path / "plan.json"), "--inversion", str(tmp_path / "seen.png"), "--iterations", "2"]
    )
    assert done.exit_code == 0, done.output
    assert "with dp-sgd" in done.output and "the label map alone" in done.output
    with Pillow.open(tmp_path / "seen.png") as picture:
        assert picture.width > picture.height > 200

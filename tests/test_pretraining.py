"""Learning from public images: what is restored, what it costs, what is refused, and how a training begins with it."""

from functools import partial

import numpy as np
import pytest

import autofed
from autofed import pretraining
from autofed.federation import states
from autofed.network import build, load_weights, weights_of
from autofed.plans import Network
from autofed.prepared import prepared_sites
from autofed.pretraining import learn, length
from autofed.privacy.ledger import PrivacyLedger
from autofed.problems import Problems
from autofed.runs import Run
from autofed.verbs import hospitals
from tests.plans_made import small_plan
from tests.synthetic import make_site

RGB = ("R", "G", "B")
PICTURES = {"dimension": 2, "channels": RGB, "ending": ".png"}


def public(folder, cases=6, **more):
    """A folder of images that nobody labelled."""
    return make_site(folder, cases=cases, unlabelled=cases, **more)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return public(tmp_path_factory.mktemp("pictures") / "public", **PICTURES)


@pytest.fixture(scope="module")
def plan():
    return small_plan((1, 32, 32), RGB, labels=2, **{"network.features": [8, 8, 8, 8]})


# --- learning


@pytest.mark.parametrize("scheme", ["zscore", "nonorm"])
def test_it_learns_to_restore_on_whatever_scale_the_images_are(plan, pictures, tmp_path, scheme):
    made = plan.change({"intensity.channels": [{"scheme": scheme, "mean": None, "std": None}] * 3})
    found = learn(made, pictures, tmp_path, steps=30)
    assert found.error < 0.9 < 1 < found.errors[0]  # the mean of all gives 1
    assert found.words()["count"] == 6 and found.words()["steps"] == 30


def test_its_own_heads_are_as_they_begin_and_all_else_has_learned(plan, pictures, tmp_path):
    """Also where there are as many structures as channels, so that the other head would fit."""
    assert plan.local.network.classes == plan.local.network.in_channels == 3
    found = learn(plan, pictures, tmp_path, steps=2).weights
    begun = weights_of(build(plan.local.network, seed=plan.local.training.seed))
    assert list(found) == list(begun)
    assert {n for n in found if np.array_equal(found[n], begun[n])} == {n for n in found if n.startswith("heads.")}


def test_the_seed_decides_and_prepared_images_are_found_again(plan, pictures, tmp_path):
    stages = []
    one = learn(plan, pictures, tmp_path, steps=2)
    two = learn(plan, pictures, tmp_path, steps=2, progress=lambda stage, done, total: stages.append(stage))
    other = learn(plan.change({"training.seed": 7}), pictures, tmp_path, steps=2)
    assert set(stages) == {"learning from public images"}
    assert all(np.array_equal(one.weights[n], two.weights[n]) for n in one.weights)
    assert one.images == other.images and not np.array_equal(one.errors, other.errors)


@pytest.mark.parametrize("kind", ["unet", "resenc", "dcfed"])
def test_volumes_larger_and_smaller_than_a_patch_teach_every_kind_of_network(tmp_path, kind):
    made = small_plan((16, 16, 16), labels=1)
    blocks = {} if kind == "unet" else {"network.blocks": [1] * len(made.local.network.features)}
    made = made.change({"network.kind": kind, **blocks})
    folder = public(tmp_path / "public", shape=(12, 40, 16))
    found = learn(made, folder, tmp_path / "work", steps=5)
    load_weights(build(made.local.network), found.weights)
    assert found.errors[-1] < found.errors[0]


def test_flat_patches_are_slices_of_volumes(tmp_path):
    made = small_plan((1, 32, 32), ("MRI",), labels=1)
    made = made.change({"agreement.dimension": 3})
    assert learn(made, public(tmp_path / "public"), tmp_path / "work", steps=2).count == 6


def test_half_of_the_squares_are_missing_and_the_rest_is_noisy():
    whole = np.full((40, 2, 12, 20), 5.0, np.float32)
    seen = pretraining._spoiled(whole, (4, 8), np.random.default_rng(1))
    gone = seen[:, 0] == 0
    assert gone.mean() == pytest.approx(0.5, abs=0.05) and np.array_equal(gone, seen[:, 1] == 0)
    assert (gone[:, 4:8, 8:16] == gone[:, 4:5, 8:9]).all() and (gone[:, 8:, 16:] == gone[:, 8:9, 16:17]).all()
    assert (seen[:, 0][~gone] - 5).std() == pytest.approx(0.3, rel=0.05)


def test_what_is_missing_is_short_where_slices_lie_far_apart():
    network = Network(in_channels=1, classes=2, features=(4,) * 5, kernels=((3, 3, 3),) * 5,
                      strides=((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)))  # fmt: skip
    assert pretraining._squares(network, (16, 64, 64)) == (2, 8, 8)


# --- how long


def test_a_tenth_of_the_hours_within_bounds(plan):
    def after(hours, **more):
        return length(plan.model_copy(update={"budget": plan.budget.model_copy(update={"hours": hours, **more})}))

    batch, steps = after(0.01)
    network = pretraining._with_restoring_head(plan.local.network)
    seconds = plan.budget.speed.seconds(network, plan.local.training.patch_size, 16)
    assert batch == 16 and steps == int(3.6 / seconds)
    assert after(1e-6)[1] == 100 and after(1e3)[1] == after(None)[1] == after(0.5, speed=None)[1] == 2000
    needed = network.training_bytes(plan.local.training.patch_size, 8) / 1e9
    assert after(0.5, memory_gb=needed)[0] == 8 and after(0.5, memory_gb=1e-9)[0] == 1


# --- what is refused


def test_other_images_than_the_plans_are_named_with_what_was_expected(plan, tmp_path):
    with pytest.raises(Problems) as error:
        learn(plan, public(tmp_path / "few", cases=2), tmp_path)
    (channels, dimension, few) = error.value.problems
    assert channels == "the images have channels: 1 (MRI); the plan's are 3 (R, G, B)"
    assert dimension == "the images have dimension: 3D; the plan's are 2D"
    assert few == "found 2 images; expected 5 or more"


def test_of_many_images_some_are_taken_evenly(plan, pictures, monkeypatch):
    monkeypatch.setattr(pretraining, "MOST_IMAGES", 3)
    assert [case[-1] for case in pretraining.open_public(plan, pictures).cases] == ["0", "2", "4"]


# --- a training that begins with it


class Ground:
    """Two sites of pictures and a plan with a private mechanism, of which only the decoder learns."""

    def __init__(self, root):
        self.root = root
        sites = [make_site(root / "raw" / n, cases=3, seed=5, **PICTURES) for n in ("alpha", "bravo")]
        stages = len(autofed.plan(sites, hours=0.01, device="cpu").local.network.features)
        settings = {"training.batch_size": 2, "training.steps_per_round": 2, "training.rounds": 2,
                    "network.features": [4] * stages, "privacy.mechanism": "dp-sgd", "sampling_rate": 0.6,
                    "training.trained": "decoder"}  # fmt: skip
        self.plan = autofed.plan(sites, root / "plan.json", hours=0.01, device="cpu", settings=settings)
        autofed.preprocess(self.plan, sites, root / "work")
        self.train = partial(autofed.train, self.plan, root / "work", device="cpu")
        self.try_out = partial(self.train, simulation=True)


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    return Ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture
def ground(federation, monkeypatch):
    """The federation, for learning in three steps."""
    monkeypatch.setattr(pretraining, "MOST_STEPS", 3)
    return federation


def test_a_private_training_begins_with_what_public_images_taught(ground, pictures, tmp_path, monkeypatch):
    def stop(stage, done, total):
        if stage == "training" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ground.train(tmp_path / "run", init=pictures, progress=stop)
    monkeypatch.setattr(pretraining, "learn", None)  # what was learned is not learned again
    run = ground.train(tmp_path / "run", resume=True)
    taught = learn(ground.plan, pictures, tmp_path / "work")
    assert run.origin() == taught.words() and run.origin()["steps"] == 3
    start, end = run.start(), states.load(run.rounds_folder, 2).shared["weights"]
    assert all(np.array_equal(start[n], taught.weights[n]) for n in start)
    still = {n for n in start if np.array_equal(start[n], end[n])}
    assert still == {n for n in start if n.startswith("down.")}
    ledger = PrivacyLedger.existing(ground.root / "work" / "alpha" / "ledger.jsonl")
    assert ledger.epsilon() == pytest.approx(ground.plan.agreement.privacy.epsilon, rel=1e-3)
    assert prepared_sites(ground.root / "work") == ["alpha", "bravo"]  # the public images are no site


def test_learning_that_was_cut_off_leaves_a_folder_to_begin_in(ground, pictures, tmp_path):
    def stop(stage, done, total):
        if stage == "learning from public images" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ground.try_out(tmp_path / "run", init=pictures, progress=stop)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["ledgers"]  # those of the simulation
    Run(tmp_path / "run").public_folder.mkdir()  # as a killed process leaves it
    run = ground.try_out(tmp_path / "run", init=pictures)
    assert run.models() == ["global"] and not run.public_folder.exists()


@pytest.mark.parametrize("algorithm", ["scaffold", "fedbn", "local", "pooled"])
def test_every_algorithm_begins_with_it(ground, pictures, tmp_path, algorithm):
    made = ground.plan.change({"privacy.mechanism": "none", "training.rounds": 1, "learning_rate": 1e-12})
    train = partial(autofed.train, made, ground.root / "work", device="cpu", simulation=True)
    run = train(tmp_path / "run", algorithm=algorithm, init=pictures)
    member = run.members(run.models()[0])[0].read()
    assert all(np.allclose(member[n], a, atol=1e-6) for n, a in run.start().items())


def test_over_a_connection_the_coordinator_learns_before_it_asks_anybody(ground, pictures, tmp_path, monkeypatch):
    led = []
    monkeypatch.setattr(hospitals, "submit", lambda coordinator, fold, **_: led.append(coordinator._setup(fold)))
    run = autofed.train(ground.plan, None, tmp_path / "run", init=pictures, connection="somewhere")
    assert run.origin()["count"] == 6
    assert all(np.array_equal(led[0].weights[n], a) for n, a in run.start().items())


def test_images_of_a_site_are_not_public(ground, pictures, tmp_path):
    folder = tmp_path / "public"
    public(folder, **PICTURES)
    theirs = ground.root / "raw" / "bravo" / "imagesTr" / "bravo_001_0000.png"
    (folder / "imagesTr" / "public_002_0000.png").write_bytes(theirs.read_bytes())
    with pytest.raises(Problems, match="1 images are files of bravo as well, such as bravo_001_0000.png"):
        ground.try_out(tmp_path / "run", init=folder)
    assert not Run(tmp_path / "run").exists


def test_random_weights_that_never_learn_are_refused(ground, tmp_path):
    with pytest.raises(Problems, match='with "decoder" the way down stays as .* give --init a RUN'):
        ground.try_out(tmp_path / "run")


def test_what_can_be_started_from_is_said_where_it_is_none_of_it(ground, tmp_path):
    expected = "expected a RUN, a file of weights .*, or a folder of public images"
    (tmp_path / "note.txt").write_text("no weights")
    (tmp_path / "images").mkdir()
    found = {"nowhere": "no such file or folder", "images": "a folder without run.json and without dataset.json",
             "note.txt": "not one of autofed's"}  # fmt: skip
    for name, said in found.items():
        with pytest.raises(Problems, match=f"{said}.*{expected}"):
            ground.try_out(tmp_path / "run", init=tmp_path / name)

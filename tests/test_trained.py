"""Which weights learn: with the decoder alone, the way down stays as it began, and neither clip nor noise sees it."""

import numpy as np
import pytest

import autofed
from autofed.errors import ValidationErrors
from autofed.federation import checkpoints
from autofed.messages import load_groups, save_groups
from autofed.plans import Training
from autofed.privacy.dpsgd import DPSGD
from autofed.privacy.feddp import FedDP
from autofed.training.fit import Schedule, fit
from autofed.training.network import build, weights_of
from tests import small_federation as small
from tests.plans_made import small_plan
from tests.synthetic import make_site
from tests.test_network import PLANS

DECODER = Training(patch_size=(8, 8), batch_size=1, steps_per_round=1, trained="decoder")


@pytest.mark.parametrize("name", PLANS)
def test_as_many_learn_as_is_stated_and_all_of_the_way_up_does(name):
    plan = PLANS[name]
    sizes = {n: p.numel() for n, p in build(plan).named_parameters()}
    learning = {n for n in sizes if DECODER.learns(n)}
    assert {n.split(".")[0] for n in learning} == {"up", "heads"}
    assert sum(sizes[n] for n in learning) == plan.trained_parameters("decoder") < plan.parameters
    assert plan.trained_parameters("all") == sum(sizes.values())


@pytest.fixture(scope="module")
def ground(ground):
    plan, stores = ground
    return plan.change({"training.trained": "decoder", "training.rounds": 2}), stores


def begun(plan):
    return weights_of(build(plan.local.network, seed=1))


def parted(plan, arrays):
    """Those that learn, and those that do not."""
    learn = {n: a for n, a in arrays.items() if plan.local.training.learns(n)}
    return learn, {n: a for n, a in arrays.items() if n not in learn}


CASES = [(a, "none" if a == "pooled" else "dp-sgd") for a in [*small.sharing(), "local"]]
CASES += [("fedavg", "adp"), ("fedavg", "feddp"), ("fedavg", "none")]


@pytest.mark.parametrize(("algorithm", "mechanism"), CASES)
def test_the_way_down_ends_as_it_began_to_the_bit(ground, tmp_path, algorithm, mechanism):
    """With rounded messages, momentum, an average over rounds and the coordinator's own step."""
    more = {"training.ema": 0.8, "training.momentum": 0.9, "wire": "int8"} | (
        {"server.optimiser": "adam"} if algorithm == "fedavg" else {}
    )
    plan = ground[0].change(more) if mechanism == "none" else small.private(ground[0], mechanism, **more)
    state = small.train((plan, ground[1]), tmp_path, algorithm)
    models = [f for f in (state.shared.get("weights"), state.server_only.get("mean")) if f]
    learn, still = parted(plan, begun(plan))
    for path in tmp_path.glob("sites/*/memory/round_00002.safetensors"):
        groups = load_groups(path)[0]
        assert all(not array.any() for array in parted(plan, groups.get("control", {}))[1].values())
        if algorithm == "local":
            models += [groups["weights"], groups["mean"]]
    assert models
    for model in models:
        assert all(np.array_equal(model[n], still[n]) for n in still)
        assert any(not np.array_equal(model[n], learn[n]) for n in learn)


def test_a_site_of_its_own_normalisation_keeps_the_way_down_too(ground, tmp_path):
    plan = ground[0]
    small.train(ground, tmp_path, "fedbn")
    _, still = parted(plan, begun(plan))
    for path in tmp_path.glob("sites/*/memory/round_00002.safetensors"):
        assert all(np.array_equal(load_groups(path)[0]["weights"][n], still[n]) for n in still)


def test_noise_is_on_what_learns_alone_and_as_long_as_that_is_many(ground):
    """A step that draws nobody is noise alone, as long as the root of the number of what learns, times zC/(qn)."""
    plan, stores = ground
    plain = {"training.momentum": 0.0, "weight_decay": 0.0, "gradient_clip": 1e6, "learning_rate": 1.0}
    local = plan.change(plain).local
    mechanism = DPSGD(3, 1e-9, 1, 1.0, 1e-9).with_key(b"2" * 32)  # q n = 3e-9, so that a step is N(0, 1/9)
    fitted = fit(begun(plan), stores["bravo"], local, mechanism, Schedule(1, lambda _: 1.0, (1,)))
    learn, still = parted(plan, fitted.update(begun(plan)))
    assert not any(a.any() for a in still.values())
    noise = np.concatenate([a.ravel() for a in learn.values()])
    assert len(noise) == plan.local.network.trained_parameters("decoder")
    assert np.linalg.norm(noise) == pytest.approx(np.sqrt(len(noise)) / 3, rel=0.1)


def test_the_noise_on_an_update_leaves_out_what_does_not_learn():
    update = {"down.w": np.full(300, 5.0, np.float32), "up.w": np.zeros(300, np.float32)}
    (found,) = FedDP(1.0, 2.0, 1, DECODER.frozen).with_key(b"3" * 32).release({"update": update}).values()
    assert not found["down.w"].any() and found["up.w"].std() == pytest.approx(2, rel=0.2)


# --- by the verb


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A plan of which only the decoder learns, and WORK."""
    root = tmp_path_factory.mktemp("verb")
    sites = [make_site(root / name, cases=3) for name in ("alpha", "bravo")]
    labels, chosen = {"background": 0, "tumour": 1}, {"training.rounds": 1, "training.trained": "decoder"}
    plan = small_plan(labels=labels, cases=6, **chosen)
    autofed.preprocess(plan, sites, root / "work")
    return plan, root / "work"


def test_a_way_down_that_was_given_stays_and_random_weights_are_refused(work, tmp_path):
    plan, prepared = work
    with pytest.raises(
        ValidationErrors, match='with "decoder" the encoder keeps its initial weights.* give --init a RUN'
    ):
        autofed.train(plan, prepared, tmp_path / "run", device="cpu", simulation=True)
    start = {name: array + np.float32(0.25) for name, array in begun(plan).items()}
    save_groups(tmp_path / "start.safetensors", {"weights": start})
    run = autofed.train(plan, prepared, tmp_path / "run", init=tmp_path / "start.safetensors", device="cpu",
                        simulation=True)  # fmt: skip
    end = checkpoints.load(run.fold_folder(), 1).shared["weights"]
    assert {n for n in start if np.array_equal(start[n], end[n])} >= {n for n in start if n.startswith("down.")}
    assert any(not np.array_equal(start[n], end[n]) for n in start)


@pytest.mark.parametrize(("name", "said"), [
    ("nowhere", "no such file or folder"),
    ("images", "a folder without run.json"),
    ("note.txt", "not one of autofed's"),
])  # fmt: skip
def test_what_can_be_started_from_is_said_where_it_is_none_of_it(work, tmp_path, name, said):
    (tmp_path / "note.txt").write_text("no weights")
    (tmp_path / "images").mkdir()
    with pytest.raises(ValidationErrors, match=f"{said}.*expected a RUN, or a file of weights"):
        autofed.train(*work, tmp_path / "run", init=tmp_path / name, device="cpu", simulation=True)


def test_a_simulation_that_was_refused_leaves_a_folder_to_begin_in(work, tmp_path):
    plan, prepared = work
    for _ in range(2):  # the second is refused for the same reason, not for what the first left behind
        with pytest.raises(ValidationErrors, match="no such file or folder"):
            private = small.private(plan, "dp-sgd")
            autofed.train(private, prepared, tmp_path / "run", init="nowhere", device="cpu", simulation=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["ledgers"]

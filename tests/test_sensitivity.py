"""How far one patient moves what is released before noise, measured on the real objects: never beyond what is billed.

The same secret gives the same draws and the same noise, so the difference of two answers is what a patient did to it.
"""

from dataclasses import dataclass, fields
from itertools import islice

import numpy as np
import pytest
import torch

from autofed.auditing.canaries import Canaries, make_picture
from autofed.data.labels import Labels
from autofed.messages import Request, from_bytes, to_bytes
from autofed.privacy import ADAPTATION
from autofed.privacy.adp_fl import Adaptive
from autofed.privacy.dpsgd import DPSGD
from autofed.privacy.feddp import FedDP
from autofed.training.batches import make_step_batches
from autofed.training.fit import Learner
from autofed.training.network import build, load_weights, weights_of
from tests import small_federation
from tests.plans_made import small_plan
from tests.privacy_checks import secret

RATE, ROUNDING = 0.5, 1e-5
NOISE = 1e-3
"""Small, so that little is rounded away; what is measured does not depend on it."""

MECHANISMS = {
    "flat": lambda n, clip: DPSGD(n, RATE, 2, clip, NOISE),
    "normalised": lambda n, clip: DPSGD(n, RATE, 2, clip, NOISE, normalised=True),
    "adp": lambda n, clip: Adaptive(n, RATE, 2, clip, NOISE, quantile_share=0.1),
    "adp normalised": lambda n, clip: Adaptive(n, RATE, 2, clip, NOISE, normalised=True, quantile_share=0.4),
}


def answers(mechanism, gradients, like, number):
    """The sum of bounded gradients, and the count if there is one, each with the noise of this secret."""
    with_key = mechanism.with_key(secret(number))
    step = [part.double() * with_key.expected for part in with_key.step(iter(gradients), like)]
    count = [
        torch.from_numpy(a).double() * with_key.expected for a in with_key.release({}).get(ADAPTATION, {}).values()
    ]
    return torch.cat([part.flatten() for part in step]), torch.cat(count) if count else torch.zeros(1)


def share_of_bound(mechanism, gradients, who, like, number) -> float:
    """How far the patient at place `who` moves a step, over the bound: both answers as one, by what each is noised."""
    others = [gradient for place, gradient in enumerate(gradients) if place != who]
    with_them = answers(mechanism, gradients, like, number)
    without = answers(mechanism, others, like, number)
    step, count = (float(torch.linalg.vector_norm(a - b)) for a, b in zip(with_them, without, strict=True))
    (event,) = mechanism.cost(1)
    parts = [step / (mechanism.gradient_noise * mechanism.clip)]
    parts += [count / mechanism.count_noise] if isinstance(mechanism, Adaptive) else []
    return event.noise_multiplier * float(np.hypot.reduce(parts))


# --- vectors of any length


@pytest.mark.parametrize("name", MECHANISMS)
def test_of_vectors(name):
    generator, shares = np.random.default_rng(1), []
    for number in range(300):
        patients = int(generator.integers(1, 9))
        mechanism = MECHANISMS[name](patients, float(10 ** generator.uniform(-2, 1)))
        shapes = [tuple(generator.integers(1, 6, generator.integers(1, 4))) for _ in range(3)]
        gradients = [
            [torch.from_numpy(generator.normal(size=s) * 10 ** generator.uniform(-4, 4)).float() for s in shapes]
            for _ in range(patients)
        ]
        like = [torch.zeros(s) for s in shapes]
        shares.append(share_of_bound(mechanism, gradients, int(generator.integers(patients)), like, number))
    assert max(shares) <= 1 + 1e-3  # float32 beside noise of a thousandth
    assert max(shares) > 0.9  # and the bound is reached


@pytest.mark.parametrize("name, size", [("flat", 1 << 16), ("flat", 1 << 21), ("normalised", 1 << 21)])
def test_of_large_arrays(name, size):
    """A length of millions of numbers in one array is not taken for shorter than it is."""
    gradient = [torch.from_numpy(np.random.default_rng(0).random(size, dtype=np.float32))]
    assert share_of_bound(MECHANISMS[name](10, 1.0), [gradient], 0, [torch.zeros(size)], 1) <= 1 + 1e-6


# --- networks


def hospital(plan, patients, generator):
    """Patients with 2 to 5 cases each, in memory, with a foreground."""
    cases = {f"p{i}": tuple(f"p{i}_{j}" for j in range(generator.integers(2, 6))) for i in range(patients)}
    names = [case for own in cases.values() for case in own]
    images = {name: make_picture(plan, generator) for name in names}
    values = np.array(sorted(Labels.of(plan.agreement).values), np.int16)
    maps = {name: values[np.digitize(image[0], [0.0])] for name, image in images.items()}
    return Canaries({}, cases, (), images, maps)


@pytest.mark.parametrize("shape, steps", [((1, 16, 16), 10), ((16, 16, 16), 4)], ids=["2d", "3d"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_of_networks(name, shape, steps):
    """Leaving a patient out of a draw leaves the others' patches and gradients as they are, to the bit."""
    plan, generator = small_plan(shape=shape, labels=1), np.random.default_rng(len(name))
    store = hospital(plan, 4, generator)
    learner = Learner(plan.local.network, plan.local.training, "cpu", Labels.of(plan.agreement))
    weights = weights_of(learner.module)
    load_weights(learner.module, {n: generator.normal(size=a.shape) * 0.3 for n, a in weights.items()})
    like, shares = list(learner.module.parameters()), []
    for clip in (0.05, 1.0):
        mechanism = MECHANISMS[name](4, clip)
        for step, draw in enumerate(islice(mechanism.with_key(secret(9)).sampler(list(store.patients), [0]), steps)):
            if not draw:
                continue
            who = step % len(draw)
            gradients = gradients_of(learner, store, draw, plan, step)
            others = gradients_of(learner, store, [g for i, g in enumerate(draw) if i != who], plan, step)
            left = [gradient for place, gradient in enumerate(gradients) if place != who]
            assert all(torch.equal(a, b) for one, other in zip(left, others, strict=True)
                       for a, b in zip(one, other, strict=True))  # fmt: skip
            shares.append(share_of_bound(mechanism, gradients, who, like, step))
    assert 0.5 < max(shares) <= 1 + 1e-3


@pytest.mark.parametrize("name", ["unet", "resenc", "dcfed"])
def test_what_drops_out_for_a_patient_depends_on_no_other(name):
    """Nor on what was drawn before; and the patches of one patient do not all lose the same channels."""
    plan = small_plan(shape=(1, 16, 16), labels=1)
    blocks = [] if name == "unet" else [1] * len(plan.local.network.features)
    plan = plan.change({"network.dropout": 0.4, "network.kind": name, "network.blocks": blocks})
    store = hospital(plan, 3, np.random.default_rng(0))
    learner = Learner(plan.local.network, plan.local.training, "cpu", Labels.of(plan.agreement))
    everyone, lost = [[patient] * 2 for patient in store.patients], []
    learner.module.dropout.register_forward_hook(lambda *call: lost.append(call[2].detach().abs().amax((2, 3)) == 0))
    together = gradients_of(learner, store, everyone, plan, 0)
    assert all(not torch.equal(*(one.float() for one in seen)) for seen in lost if seen.shape[1] > 8)
    torch.manual_seed(5)
    for who in (0, 1, 2):
        (alone,) = gradients_of(learner, store, [everyone[who]], plan, 0)
        assert all(torch.equal(a, b) for a, b in zip(together[who], alone, strict=True))
    (later,) = gradients_of(learner, store, everyone[:1], plan, 1)
    assert not all(torch.equal(a, b) for a, b in zip(together[0], later, strict=True))


def gradients_of(learner, store, draw, plan, step):
    return [learner.gradient(group, []) for group in make_step_batches(store, draw, plan.local.training, [7, step])]


# --- the door of a site


@dataclass(frozen=True)
class Missing(DPSGD):
    """DP-SGD on a site one of whose patients was replaced by nothing: drawn all the same, and nothing to learn from."""

    who: str = ""

    def sampler(self, patients, seed):
        for draw in super().sampler(patients, seed):
            yield [group for group in draw if group[0] != self.who]


@pytest.mark.parametrize("algorithm", ["fedavg", "fedprox"])
def test_at_the_door(ground, tmp_path, algorithm):
    """What a site sends after one local step, all in all: patches, network, clips, optimiser, algorithm."""
    made = small_federation.with_algorithm(ground[0], algorithm)
    plan = small_federation.private(made, "dp-sgd", clipping="flat", clip=1e-3)
    training, store = plan.local.training, ground[1]["bravo"]
    weights = weights_of(build(plan.local.network, seed=1))
    request = to_bytes(Request("r", 1, "train", {"weights": weights}))

    def answer(who: str) -> dict:
        ledgers = {"bravo": tmp_path / f"{who}.jsonl"}
        site = small_federation.site_of(
            "bravo", store, plan, tmp_path / f"site{who}", ledgers, run="r", noise_seed=5, simulation=True
        )
        made = site.mechanism
        site.mechanism = Missing(**{f.name: getattr(made, f.name) for f in fields(DPSGD)}, who=who)
        return from_bytes(site.answer(request)).arrays["update"]

    whole = answer("")
    stepped = training.learning_rate * (1 + training.momentum)  # Nesterov's first step
    bound = stepped * plan.agreement.privacy.clip / (plan.agreement.privacy.sampling_rate * len(store.patients))
    shares = []
    for who in store.patients:
        found = answer(who)
        apart = np.concatenate([np.ravel(whole[n].astype(np.float64) - found[n]) for n in whole])
        shares.append(float(np.linalg.norm(apart)) / bound)
    assert 0.99 < max(shares) <= 1 + 1e-3
    assert all(share < 1e-9 or share > 0.99 for share in shares)  # drawn, or not


# --- whole updates


def test_of_updates():
    """FedDP: between any two data sets an update moves by up to 2 C, as billed, and two opposite ones by just that."""
    generator, mechanism = np.random.default_rng(2), FedDP(0.7, NOISE, 2)
    (event,) = mechanism.cost(1)
    bound = mechanism.clip * NOISE / event.noise_multiplier
    shares = []
    for number in range(300):
        shapes = {"a": (3, 5), "b": (7,), "c": ()}
        one, other = ({n: np.float32(generator.normal(size=s) * 10 ** generator.uniform(-3, 3))
                       for n, s in shapes.items()} for _ in range(2))  # fmt: skip
        worlds = [one, other if number % 2 else {n: -a for n, a in one.items()}]
        found = [mechanism.with_key(secret(number)).release({"update": world})["update"] for world in worlds]
        apart = [np.ravel(found[0][n].astype(np.float64) - found[1][n]) for n in shapes]
        shares.append(float(np.linalg.norm(np.concatenate(apart))) / bound)
    assert bound == pytest.approx(2 * 0.7)
    assert 0.999 < max(shares) <= 1 + 1e-6


# --- digits


def test_noise_leaves_no_trace_in_the_last_digits():
    """An attacker who knows all patients but one must not see in the last digits whether that one was added to noise.

    Numpy's normal float32 numbers are multiples of one of 256 widths, so that without the one only certain outputs are
    possible (floating-point attacks: Mironov, CCS 2012). Outputs of both worlds must be possible alike.
    """
    mechanism, like = DPSGD(10, 0.5, 2, 1.0, 3.0), [torch.zeros(2000)]
    patient = [torch.ones(2000)]
    worlds = [mechanism.with_key(secret(1)).step(gradients, like)[0].numpy() for gradients in ([], [patient])]
    alone, beside = (possible_without(world, 3.0, 1 / mechanism.expected) for world in worlds)
    assert abs(alone - beside) < 0.02


def possible_without(outputs, std, factor) -> float:
    """The share of outputs that float32 noise of this deviation can have led to, with nothing added but zeros."""
    found, noise = np.zeros(len(outputs), bool), np.abs(outputs) / np.float64(factor) / std
    for width in widths():
        for nearby in (-1, 0, 1):
            drawn = ((np.round(noise / width) + nearby).astype(np.float32) * width).astype(np.float32)
            step = (np.float32(std) * drawn).astype(np.float32) * np.float32(factor)
            found |= step.astype(np.float32) == np.abs(outputs)
    return float(found.mean())


def widths() -> np.ndarray:
    """Of the 256 layers of numpy's ziggurat (Marsaglia and Tsang 2000), in 2^23 parts."""
    edge, area = 3.6541528853610088, 4.92867323399e-3
    edges = [edge]
    while len(edges) < 255:
        edges.append(np.sqrt(-2 * np.log(area / edges[-1] + np.exp(-(edges[-1] ** 2) / 2))))
    return (np.array([area / np.exp(-(edge**2) / 2), *edges]) / 2**23).astype(np.float32)

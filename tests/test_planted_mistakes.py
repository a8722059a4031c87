"""Eighteen mistakes found in public code, planted one by one: each is caught by a check that the real thing passes.

The numbers are those of the table at the end. The checks are of `privacy_checks` and of this file; none of them knows
what was planted.
"""

from __future__ import annotations

import contextlib
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from autofed.auditing import one_run
from autofed.errors import ValidationErrors
from autofed.federation.site import TASKS, Site
from autofed.files import write_bytes
from autofed.fingerprints import FIXED_POINT, ChannelSums, merge
from autofed.messages import Request, Response, from_bytes, to_bytes
from autofed.planner.intensities import statistics
from autofed.privacy import accounting
from autofed.privacy.adp_fl import BELOW, Adaptive
from autofed.privacy.dpsgd import DPSGD
from autofed.privacy.feddp import FedDP
from autofed.privacy.ledger import LedgerEntry, PrivacyLedger
from autofed.privacy.none import NoPrivacy
from autofed.privacy.randomness import Randomness
from autofed.training.network import build, weights_of
from tests import privacy_checks as checks
from tests import small_federation
from tests.plans_made import fingerprint
from tests.privacy_checks import PATIENTS

DP_SGD = (PATIENTS, 0.5, 2, 1.0, 1.5)


# --- 1 to 5: what a step and its draw do


class WrongSign(Adaptive):
    """The indicator "was clipped" with the rule for "was not clipped" (Flower 1.42)."""

    def adapt(self, released):
        return super().adapt({BELOW: 1 - released[BELOW]})


def follows_the_norms(kind) -> bool:
    """Whether the clip of a mechanism comes to where the gradients' lengths are, from either side."""
    made = partial(kind, *DP_SGD[:4], 0.3, rounds=60)
    return all(norm / 2 < checks.clip_after(made(), norm) < norm * 2 for norm in (8.0, 0.1))


class OverTheDrawn(DPSGD):
    """A mean over the patients drawn; who leaves changes the others' weights, too."""

    def step(self, gradients, like):
        found = list(gradients)
        return [part * self.expected / max(1, len(found)) for part in super().step(found, like)]


class RawPercentile(Adaptive):
    """The share of short gradients without noise."""

    def _note(self, norms):
        self.answers.append(sum(norm <= self.clip for norm in norms) / self.expected)


class Laplace(DPSGD):
    """Laplace noise of the same standard deviation: it would need a bound in L1."""

    def with_key(self, noise_key):
        return replace(self, randomness=_LaplaceRandomness(noise_key))


class _LaplaceRandomness(Randomness):
    def normal(self, shape):
        return self.noise.laplace(0, 1 / math.sqrt(2), shape).astype(np.float32)


class Shuffling(DPSGD):
    """Every patient once an epoch, billed as if each had been drawn by a coin."""

    def sampler(self, patients, seed):
        size = round(self.expected)
        while True:
            order = list(self._randomness.draws.permutation(sorted(patients)))
            yield from ([[n] * 2 for n in order[i : i + size]] for i in range(0, len(order), size))


# --- 6 and 7: what is billed


class RoundsAsSteps(DPSGD):
    """One step billed for all those of a round (FLamby)."""

    def cost(self, steps):
        return super().cost(1)


def gives_away_more(kind) -> bool:
    """Whether the audit refutes what the mechanism itself says of its cost: 200 canaries, a claim of 1.5 at most."""
    mechanism, generator = kind(200, 0.5, 1, 1.0, 4.0), np.random.default_rng(0)
    trial = one_run.attack(mechanism, rounds=1, steps=100, canaries=200, generator=generator)
    return trial.bound(1e-5, alpha=1e-3).epsilon > accounting.epsilon(trial.events, 1e-5)


class Forgetful(PrivacyLedger):
    """A new accountant each round: what was spent before is not counted."""

    def _ceiling_problems(self, charge):
        self._spent = ()
        return super()._ceiling_problems(charge)


def keeps_its_ceiling(kind) -> Callable[[Path], bool]:
    """Whether a ledger refuses what would pass its ceiling; the figure is taken over everything that it let through."""

    def check(folder: Path) -> bool:
        ledger = kind(folder / f"{kind.__name__}.jsonl", "alpha", 3.0, 1e-5)
        events = DPSGD(*DP_SGD[:4], 6.0).cost(5)
        with contextlib.suppress(ValidationErrors):
            for round in range(1, 30):
                ledger.charge(LedgerEntry(run="r", round=round, question="train", agreement="a", events=events))
        spent = [event for charge in ledger.charges() for event in charge.events]
        return 0 < accounting.epsilon(spent, 1e-5) <= 3.0

    return check


# --- 8 to 13: sensitivity and noise


@dataclass(frozen=True)
class OwnKnob(DPSGD):
    """Noise for a sensitivity that is set apart from the clip."""

    sensitivity: float = 1e-3

    @property
    def gradient_noise(self):
        return self.noise_multiplier * self.sensitivity


class PatchIsPatient(DPSGD):
    """Every patch clipped by itself, and a patient has several."""

    def sampler(self, patients, seed):
        for draw in super().sampler(patients, seed):
            yield [[name] for group in draw for name in group]


class ByExamples(DPSGD):
    """Who has more cases counts more, but the noise is for one each; here all have three."""

    def _add(self, total, gradient):
        return [DPSGD._add(self, total, gradient) for _ in range(3)][0]


class OverItsNorm(DPSGD):
    """A zero gradient divided by its length."""

    def _add(self, total, gradient):
        norm = torch.linalg.vector_norm(torch.cat([part.flatten() for part in gradient]))
        torch._foreach_add_(total, [part * (self.clip / norm) for part in gradient])
        return float(norm)


class GlobalNoise(DPSGD):
    """Noise from the generator that the training's seed has set."""

    def with_key(self, noise_key):
        return replace(self, randomness=_GlobalRandomness(noise_key))


class _GlobalRandomness(Randomness):
    def normal(self, shape):
        return np.random.standard_normal(shape).astype(np.float32)


class HalfTheBound(FedDP):
    """An update of length C billed as if it moved by C at most: it moves by 2 C."""

    def cost(self, steps):
        (event,) = super().cost(steps)
        return (event.model_copy(update={"noise_multiplier": self.noise_multiplier}),)


# --- 14 and 15: fingerprints and messages


def averaged(fingerprints):
    """Fingerprints merged by averaging standard deviations (FednnU-Net)."""
    merged, own = merge(fingerprints), [statistics(f.channels[0], "ct") for f in fingerprints]
    mean = np.mean([channel.mean for channel in own])
    square = np.mean([channel.std for channel in own]) ** 2 + mean**2
    cases = merged.channels[0].cases
    sums = {"total": round(mean * cases * FIXED_POINT), "squares": round(square * cases * FIXED_POINT)}
    return merged.model_copy(update={"channels": (merged.channels[0].model_copy(update=sums),)})


def is_of_all_data(merging) -> bool:
    """Whether a merged fingerprint has the mean and deviation of all cases in one place."""
    generator = np.random.default_rng(0)
    voxels = {"alpha": generator.normal(100, 5, (3, 500)), "bravo": generator.normal(300, 40, (7, 500))}
    found = statistics(merging([_fingerprint(site, rows) for site, rows in voxels.items()]).channels[0], "ct")
    pooled = np.concatenate(list(voxels.values()))
    return bool(np.allclose([found.mean, found.std], [pooled.mean(), pooled.std()], rtol=1e-3))


def _fingerprint(site, rows):
    total, squares = (round(float(np.sum(np.mean(v, 1))) * FIXED_POINT) for v in (rows, rows**2))
    sums = ChannelSums(cases=len(rows), total=total, squares=squares, histogram={"0": len(rows) * FIXED_POINT})
    return fingerprint(sites=(site,), cases=len(rows), channels=("CT",)).model_copy(update={"channels": (sums,)})


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def runs_no_code(read) -> Callable[[Path], bool]:
    """Whether bytes from outside are read without running what they say."""

    def check(folder: Path) -> bool:
        path = folder / f"{read.__module__}.{read.__name__}"
        with contextlib.suppress(Exception):
            read(pickle.dumps(_Bomb(path)))
        return not path.exists()

    return check


# --- 16: norms from hooks


class Aliased(nn.Module):
    """A network that uses one layer twice, under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))).square().sum()


def hooked_length(module, x) -> float:
    """The length of a gradient put together from what hooks saw at each layer: of two calls the later one."""
    seen = {}

    def hook(layer, inputs, output):
        output.register_hook(lambda grad, inputs=inputs: seen.update({layer: (grad.T @ inputs[0], grad.sum(0))}))

    handles = [layer.register_forward_hook(hook) for layer in module.modules() if isinstance(layer, nn.Linear)]
    module(x).backward()
    for handle in handles:
        handle.remove()
    return math.sqrt(sum(float(part.square().sum()) for parts in seen.values() for part in parts))


def whole_length(module, x) -> float:
    """The length as `DPSGD` takes it, of the whole gradient."""
    from autofed.privacy.clipping import length

    return length(list(torch.autograd.grad(module(x), list(module.parameters()))))


def bounds_a_network(measure) -> bool:
    """Whether gradients of an aliased network, cut by a measured length to 1, are not longer than 1."""
    torch.manual_seed(0)
    module, longest = Aliased(), 0.0
    for _ in range(20):
        x = torch.randn(3, 8)
        true = torch.cat([g.flatten() for g in torch.autograd.grad(module(x), list(module.parameters()))]).norm()
        longest = max(longest, float(true) * min(1.0, 1 / measure(module, x)))
    return longest <= 1 + 1e-5


# --- 17 and 18: what a site answers


@pytest.fixture(scope="module")
def ground(ground):
    plan, stores = ground
    return small_federation.private(plan, "dp-sgd"), stores["bravo"]


def ask(kind, ground, folder, **options):
    """A site of that kind, and how to ask it."""
    plan, store = ground
    ledger = folder / "ledger.jsonl"
    some, other, *_ = sorted(store.patients)
    site = small_federation.site_of(
        "bravo", store, plan, folder / "site", {"bravo": ledger}, held=store.only([some, other]), kind=kind
    )
    weights = weights_of(build(plan.local.network, seed=1))

    def answer(question, round):
        return site.answer(to_bytes(Request("r", round, question, {"weights": weights}, since=0)))

    return site, answer, PrivacyLedger.existing(ledger)


class TellsScores(Site):
    """Answers how the model scores on patients held out, so that the best round can be chosen, and charges nothing."""

    def _read(self, data):
        return from_bytes(data)

    def _output_mechanism(self, request):
        return super()._output_mechanism(request) if request.task == "train" else NoPrivacy(1)

    def _charge(self, request, mechanism):
        if request.task == "train":
            super()._charge(request, mechanism)


def pays_for_all(kind):
    """Whether everything that a site answers, to whatever question, is charged with noise."""

    def check(folder, ground) -> bool:
        _, answer, ledger = ask(kind, ground, folder)
        told = {q for q in TASKS if getattr(from_bytes(answer(q, 1)), "arrays", {})}
        return told == {c.question for c in ledger.charges() if c.protects} == {"train"}

    return check


class Restless(Site):
    """Fresh noise for every attempt."""

    def _noise_key(self, request):
        super()._noise_key(request)
        return next(_secrets).to_bytes(32, "big")


_secrets = count(1)


def repeats_itself(kind):
    """Whether an answer that was cut off before it was stored is made again with the noise that was charged for."""

    def check(folder, ground) -> bool:
        _, answer, ledger = ask(kind, ground, folder)
        made = []

        def cut_off(path, content):
            if path.parent.name == "releases":
                made.append(content)
                if len(made) == 1:
                    raise OSError("killed")
            write_bytes(path, content)

        with mock.patch("autofed.federation.site.write_bytes", cut_off):
            answer("train", 1)
            assert isinstance(from_bytes(answer("train", 1)), Response)
        return len(made) == 2 and (made[0] == made[1] or len(ledger.charges()) == 2)

    return check


def holds(measure=checks.step_multiplier):
    """The check of a kind of mechanism that its noise is what it bills."""
    return lambda made: not checks.overstated(made, measure)


def _not(check):
    return lambda made: not check(made)


MADE = {  # number: (what, the mistake, the real thing, the check that the real thing passes)
    1: ("clip with the wrong sign", WrongSign, Adaptive, follows_the_norms),
    2: ("division by the drawn batch", OverTheDrawn(*DP_SGD), DPSGD(*DP_SGD), holds()),
    3: ("raw percentile, unpaid", RawPercentile(*DP_SGD), Adaptive(*DP_SGD), holds()),
    4: ("Laplace noise with an L2 clip", Laplace(*DP_SGD), DPSGD(*DP_SGD), checks.is_gaussian),
    5: ("shuffling billed as Poisson", Shuffling(*DP_SGD), DPSGD(*DP_SGD), checks.is_poisson),
    6: ("rounds billed as steps", RoundsAsSteps, DPSGD, _not(gives_away_more)),
    8: ("a sensitivity apart from the clip", OwnKnob(*DP_SGD), DPSGD(*DP_SGD), holds()),
    9: ("patch sold as patient", PatchIsPatient(*DP_SGD), DPSGD(*DP_SGD), holds(checks.patient_multiplier)),
    10: ("weights by examples", ByExamples(*DP_SGD), DPSGD(*DP_SGD), holds()),
    11: ("zero divided by its norm", OverItsNorm(*DP_SGD), DPSGD(*DP_SGD), checks.is_finite),
    12: ("noise from a global seed", GlobalNoise(*DP_SGD), DPSGD(*DP_SGD), _not(checks.is_foreseeable)),
    13: ("C where 2 C is due", HalfTheBound(1.0, 3.0, 2), FedDP(1.0, 3.0, 2), holds(checks.release_multiplier)),
    14: ("averaged deviations", averaged, merge, is_of_all_data),
    16: ("hooks on aliased modules", hooked_length, whole_length, bounds_a_network),
}
ON_DISK = {
    7: ("a new accountant each round", Forgetful, PrivacyLedger, keeps_its_ceiling),
    15: ("pickle from the network", pickle.loads, from_bytes, runs_no_code),
}
AT_A_SITE = {
    17: ("chosen by an uncharged score", TellsScores, Site, pays_for_all),
    18: ("a retry with fresh noise", Restless, Site, repeats_itself),
}


def table(mistakes):
    rows = [pytest.param(*row[1:], id=f"{number:02d}-{row[0].replace(' ', '-')}") for number, row in mistakes.items()]
    return pytest.mark.parametrize(("mistake", "real", "check"), rows)


def test_the_table_is_whole():
    assert sorted([*MADE, *ON_DISK, *AT_A_SITE]) == list(range(1, 19))


@table(MADE)
def test_planted(mistake, real, check):
    assert check(real)
    assert not check(mistake)


@table(ON_DISK)
def test_planted_on_disk(mistake, real, check, tmp_path):
    assert check(real)(tmp_path)
    assert not check(mistake)(tmp_path)


@table(AT_A_SITE)
def test_planted_at_a_site(mistake, real, check, tmp_path, ground):
    assert check(real)(tmp_path / "real", ground)
    assert not check(mistake)(tmp_path / "planted", ground)

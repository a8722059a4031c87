"""Auditing a plan's mechanism: what an attacker can tell of canaries, and what a patch looks like in one update.

Nothing that is computed here leaves the machine, so no ledger is charged.
"""

from __future__ import annotations

import itertools
import secrets
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from autofed import algorithms, plans, privacy
from autofed.api.public_images import with_image_digests
from autofed.auditing import one_run as audits
from autofed.auditing.canaries import attack, loss_decrease_scores, make_canaries, make_picture
from autofed.auditing.inversion import (
    Inversion,
    Reconstruction,
    gradient_of,
    invert_gradient,
    paint_labels,
    reconstruction_metrics,
)
from autofed.auditing.label_attack import label_attack_score
from autofed.auditing.one_run import Audit
from autofed.data.labels import Labels
from autofed.errors import ValidationErrors, attempts, raise_if_any
from autofed.federation.node import open_data
from autofed.federation.site import privacy_problems
from autofed.files import PathLike
from autofed.messages import Arrays
from autofed.parallel import Progress, silent
from autofed.plans import AlgorithmSettings, Plan
from autofed.preprocessing import PublicImages, Store, open_public
from autofed.privacy.accounting import default_delta
from autofed.training.batches import IDENTITY, sample_patch
from autofed.training.devices import pick_device
from autofed.training.network import build, weights_of

Kind = Literal["gradient", "image", "labels"]

USUAL_CANARIES = {"gradient": 1000, "image": 100, "labels": 100}


def audit(
    plan: PathLike | Plan,
    site_work: PathLike | None = None,
    output: PathLike | None = None,
    *,
    kind: Kind = "gradient",
    public: PathLike | None = None,
    canaries: int | None = None,
    alpha: float = 0.05,
    device: str = "auto",
    progress: Progress = silent,
) -> Audit:
    """A lower bound of the epsilon of a plan's mechanism as it runs, beside the plan's claim; JSON to `output`.

    "gradient": canary patients whose gradients are as loud as the clip allows, through all rounds and steps of the
    plan; the strongest attack, and quick. "image": the plan's network is trained at one site on canary patients with
    wrong labels: patches of the patients in `site_work` (WORK/SITE), or random pictures. That takes as long as the
    training of one site with so many patients. "labels": the same, but the attacker sees no weights, only what a site
    of DCFed would send: what the trained model says of the images in `public`. A student learns from that, which takes
    as long again. Nothing leaves the machine and no ledger is charged.

    Args:
        plan: The plan, or its file.
        site_work: WORK/SITE, whose patients make the canaries' images; by default they are made up.
        output: A JSON file for the result.
        kind: "gradient", "image" or "labels".
        public: With "labels": the folder of the public images.
        canaries: How many; by default 1000, of images and labels 100.
        alpha: The probability that the bound is wrong.
        device: What trains: auto (the fastest here), cpu, cuda or mps.
        progress: Is called with what is being done, how many are done, and how many there are.

    Raises:
        ValidationErrors: All that is wrong with what was asked for, at once.
    """
    plan = plan if isinstance(plan, Plan) else plans.load(plan)
    raise_if_any("--kind", [] if kind in USUAL_CANARIES else [f"found {kind!r}; write {', '.join(USUAL_CANARIES)}"])
    count = canaries or USUAL_CANARIES[kind]
    with TemporaryDirectory() as scratch:
        with attempts("audit") as attempt:
            held = attempt(_held, site_work, plan, kind)
            pictures = attempt(_pictures, public, plan, kind, Path(scratch))
            attempt(raise_if_any, plan.agreement.privacy.mechanism, _unanswerable(plan) if kind == "labels" else [])
            attempt(raise_if_any, "--canaries", [] if count >= audits.LEAST else [audits.too_few(count)])
        site, store = held
        setup = _AuditSetup(plan, site, alpha, np.random.default_rng(secrets.randbits(128)), progress)
        if kind == "gradient":
            result = _of_gradients(setup, count)
        else:
            result = _of_images(setup, store, count, pick_device(device), pictures, Path(scratch))
    result = result.model_copy(update={"claim": plan.agreement.privacy.epsilon or result.claim})
    if output is not None:
        result.save(Path(output))
    return result


@dataclass(frozen=True)
class _AuditSetup:
    """What every kind of audit starts from."""

    plan: Plan
    site: str | None
    alpha: float
    generator: np.random.Generator
    progress: Progress

    @property
    def lengths(self) -> dict[str, Any]:
        """Rounds, steps of a round, delta and alpha."""
        plan = self.plan
        sites = [self.site] if self.site else list(plan.agreement.patients)
        return {
            "rounds": plan.agreement.training.rounds,
            "steps": max(plan.steps_at(site) for site in sites),
            "delta": plan.agreement.privacy.delta or default_delta(max(plan.agreement.patients.values())),
            "alpha": self.alpha,
        }


def _of_gradients(setup: _AuditSetup, count: int) -> Audit:
    mechanism = privacy.find_mechanism(setup.plan, count)
    return audits.audit(mechanism, **setup.lengths, canaries=count, generator=setup.generator, progress=setup.progress)


def _of_images(
    setup: _AuditSetup, store: Store | None, count: int, device: str, public: PublicImages | None, scratch: Path
) -> Audit:
    plan, lengths = setup.plan, setup.lengths
    canaries = make_canaries(plan, count, setup.generator, store)
    patients = len(canaries.patients)
    raise_if_any("--canaries", [] if patients >= audits.LEAST else [audits.too_few(patients)])
    total, done = lengths["rounds"] * lengths["steps"], itertools.count(1)

    def on_step() -> None:
        setup.progress("training on canaries", next(done), total)

    setup.progress("training on canaries", 0, total)
    mechanism = privacy.find_mechanism(plan, patients)
    if public is None:
        score = loss_decrease_scores(plan, canaries, device)
    else:
        score = label_attack_score(plan, canaries, public, scratch, device, setup.progress)
    trial = attack(plan, mechanism, canaries, lengths["steps"], setup.generator, score, device=device, on_step=on_step)
    audited = audits.report(trial, mechanism.name, "labels" if public else "image", **lengths)
    return audited.model_copy(update={"public": len(public.folders) if public else 0})


def _pictures(folder: PathLike | None, plan: Plan, kind: Kind, scratch: Path) -> PublicImages | None:
    """The public images that the trained model is asked about, prepared; None of an attacker who sees more than that.

    `ValidationErrors` if they are missing or not wanted, or other ones than the plan agrees on.
    """
    if kind != "labels":
        raise_if_any("--public", ["that is for --kind labels; of the others the attacker sees more"] if folder else [])
        return None
    if folder is None:
        raise ValidationErrors(
            "--public", ["with --kind labels the attacker sees labels of public images; name a folder that holds them"]
        )
    return open_public(Path(folder), with_image_digests(plan, Path(folder)), scratch)


def _unanswerable(plan: Plan) -> list[str]:
    """Why no site would answer with labels by this plan's mechanism."""
    dcfed = AlgorithmSettings(name="dcfed")
    labelling = plan.model_copy(update={"agreement": plan.agreement.model_copy(update={"algorithm": dcfed})})
    return privacy_problems(labelling, algorithms.make(dcfed))


def _held(site_work: PathLike | None, plan: Plan, kind: Kind) -> tuple[str | None, Store | None]:
    """The site whose preprocessed data is in WORK/SITE, and that data if canaries are made of it."""
    site = _site(site_work, plan)
    return site, _store(site_work, plan) if site_work and kind != "gradient" else None


def _site(site_work: PathLike | None, plan: Plan) -> str | None:
    """The site whose preprocessed data is in WORK/SITE."""
    if site_work is None:
        return None
    site, sites = Path(site_work).resolve().name, list(plan.agreement.patients)
    raise_if_any(
        str(site_work),
        []
        if site in sites
        else [f"there is no site {site!r} in the plan; expected WORK/SITE with one of {', '.join(sites)}"],
    )
    return site


def _store(site_work: PathLike, plan: Plan) -> Store:
    folder = Path(site_work).resolve()
    return open_data(folder.parent, folder.name, plan)


# --- gradient inversion


def inversion(
    plan: PathLike | Plan,
    site_work: PathLike | None = None,
    *,
    iterations: int = 600,
    seed: int = 0,
    progress: Progress = silent,
) -> Inversion:
    """Reconstruct a patient's patch from the update of one local step, with and without the plan's mechanism.

    The worst case for the patient: nobody else is in the step, and the attacker knows the label map. The patch is one
    of the patients in `site_work` (WORK/SITE), or a made-up one. Nothing leaves the machine.
    """
    plan = plan if isinstance(plan, Plan) else plans.load(plan)
    generator = np.random.default_rng(seed)
    site = _site(site_work, plan)
    image, label = _patch(plan, _store(site_work, plan) if site_work else None, generator)
    weights = weights_of(build(plan.local.network, seed=seed))
    bare = gradient_of(image, label, weights, plan.local, Labels.of(plan.agreement))
    number = plan.agreement.patients[site] if site else max(plan.agreement.patients.values())
    attempt = partial(_attempt, plan, image, label, weights, iterations, seed, progress)
    return Inversion(
        mechanism=plan.agreement.privacy.mechanism,
        truth=image,
        without=attempt("without", _step(bare, plan)),
        protected=attempt("with", _protected(bare, plan, number)),
        blank=reconstruction_metrics(np.zeros_like(image), image),
        label=reconstruction_metrics(paint_labels(label, image), image),
    )


def _attempt(
    plan: Plan, image: np.ndarray, label: np.ndarray, weights: Arrays, iterations: int, seed: int, progress: Progress,
    name: str, update: Arrays,
) -> Reconstruction:  # fmt: skip
    labels = Labels.of(plan.agreement)

    def show(_: str, done: int, total: int) -> None:
        progress(f"reconstructing {name} the mechanism", done, total)

    reconstructed = invert_gradient(
        update, weights, label, plan.local, labels=labels, iterations=iterations, seed=seed, progress=show
    )
    return Reconstruction(reconstructed, reconstruction_metrics(reconstructed, image))


def _patch(plan: Plan, store: Store | None, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Image (C, *patch) and label map (*patch) of a patient, or made up: the brighter, the higher the label."""
    if store is None:
        image = make_picture(plan, generator).reshape(-1, *plan.local.training.patch_size)
        values = sorted(Labels.of(plan.agreement).values)
        edges = np.quantile(image[0], np.arange(1, len(values)) / len(values))
        return image, np.array(values, np.int16)[np.digitize(image[0], edges)]
    patient = sorted(store.patients)[int(generator.integers(len(store.patients)))]
    image, label = sample_patch(store, patient, plan.local.training, IDENTITY, generator)
    return np.ascontiguousarray(image, np.float32), np.ascontiguousarray(label)


def _step(gradient: dict[str, np.ndarray], plan: Plan) -> dict[str, np.ndarray]:
    """The update of one plain step along a gradient."""
    return {name: -np.float32(plan.local.training.learning_rate) * part for name, part in gradient.items()}


def _protected(gradient: dict[str, np.ndarray], plan: Plan, patients: int) -> dict[str, np.ndarray]:
    """What the plan's mechanism releases of a step in which this patient alone was drawn."""
    import torch

    mechanism = privacy.find_mechanism(plan, patients).with_key(secrets.token_bytes(32))
    parts = [torch.from_numpy(part) for part in gradient.values()]
    stepped = [part.numpy() for part in mechanism.step([parts], parts)]
    released = mechanism.release({"update": _step(dict(zip(gradient, stepped, strict=True)), plan)})
    if "update" not in released:
        raise ValidationErrors("--inversion", [f"{mechanism.name} releases no update"])
    return dict(released["update"])

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
    """
    made = plan if isinstance(plan, Plan) else plans.load(plan)
    raise_if_any("--kind", [] if kind in USUAL_CANARIES else [f"found {kind!r}; write {', '.join(USUAL_CANARIES)}"])
    count = canaries or USUAL_CANARIES[kind]
    with TemporaryDirectory() as scratch:
        with attempts("audit") as attempt:
            held = attempt(_held, site_work, made, kind)
            pictures = attempt(_pictures, public, made, kind, Path(scratch))
            attempt(raise_if_any, made.agreement.privacy.mechanism, _unanswerable(made) if kind == "labels" else [])
            attempt(raise_if_any, "--canaries", [] if count >= audits.LEAST else [audits.too_few(count)])
        site, store = held
        given = _Given(made, site, alpha, np.random.default_rng(secrets.randbits(128)), progress)
        if kind == "gradient":
            found = _of_gradients(given, count)
        else:
            found = _of_images(given, store, count, pick_device(device), pictures, Path(scratch))
    found = found.model_copy(update={"claim": made.agreement.privacy.epsilon or found.claim})
    if output is not None:
        found.save(Path(output))
    return found


@dataclass(frozen=True)
class _Given:
    """What every kind of audit starts from."""

    made: Plan
    site: str | None
    alpha: float
    generator: np.random.Generator
    progress: Progress

    @property
    def course(self) -> dict[str, Any]:
        """Rounds, steps of a round, delta and alpha."""
        made = self.made
        sites = [self.site] if self.site else list(made.agreement.patients)
        return {
            "rounds": made.agreement.training.rounds,
            "steps": max(made.steps_at(site) for site in sites),
            "delta": made.agreement.privacy.delta or default_delta(max(made.agreement.patients.values())),
            "alpha": self.alpha,
        }


def _of_gradients(given: _Given, count: int) -> Audit:
    mechanism = privacy.find_mechanism(given.made, count)
    return audits.audit(mechanism, **given.course, canaries=count, generator=given.generator, progress=given.progress)


def _of_images(
    given: _Given, store: Store | None, count: int, device: str, public: PublicImages | None, scratch: Path
) -> Audit:
    made, course = given.made, given.course
    canaries = make_canaries(made, count, given.generator, store)
    found = len(canaries.patients)
    raise_if_any("--canaries", [] if found >= audits.LEAST else [audits.too_few(found)])
    total, done = course["rounds"] * course["steps"], itertools.count(1)

    def on_step() -> None:
        given.progress("training on canaries", next(done), total)

    given.progress("training on canaries", 0, total)
    mechanism = privacy.find_mechanism(made, found)
    if public is None:
        score = loss_decrease_scores(made, canaries, device)
    else:
        score = label_attack_score(made, canaries, public, scratch, device, given.progress)
    trial = attack(made, mechanism, canaries, course["steps"], given.generator, score, device=device, on_step=on_step)
    audited = audits.report(trial, mechanism.name, "labels" if public else "image", **course)
    return audited.model_copy(update={"public": len(public.folders) if public else 0})


def _pictures(folder: PathLike | None, made: Plan, kind: Kind, scratch: Path) -> PublicImages | None:
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
    return open_public(Path(folder), with_image_digests(made, Path(folder)), scratch)


def _unanswerable(made: Plan) -> list[str]:
    """Why no site would answer with labels by this plan's mechanism."""
    chosen = AlgorithmSettings(name="dcfed")
    plan = made.model_copy(update={"agreement": made.agreement.model_copy(update={"algorithm": chosen})})
    return privacy_problems(plan, algorithms.make(chosen))


def _held(site_work: PathLike | None, made: Plan, kind: Kind) -> tuple[str | None, Store | None]:
    """The site whose prepared data is in WORK/SITE, and that data if canaries are made of it."""
    site = _site(site_work, made)
    return site, _store(site_work, made) if site_work and kind != "gradient" else None


def _site(site_work: PathLike | None, made: Plan) -> str | None:
    """The site whose prepared data is in WORK/SITE."""
    if site_work is None:
        return None
    site, known = Path(site_work).resolve().name, list(made.agreement.patients)
    raise_if_any(
        str(site_work),
        []
        if site in known
        else [f"there is no site {site!r} in the plan; expected WORK/SITE with one of {', '.join(known)}"],
    )
    return site


def _store(site_work: PathLike, made: Plan) -> Store:
    folder = Path(site_work).resolve()
    return open_data(folder.parent, folder.name, made)


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
    made = plan if isinstance(plan, Plan) else plans.load(plan)
    generator = np.random.default_rng(seed)
    site = _site(site_work, made)
    image, label = _patch(made, _store(site_work, made) if site_work else None, generator)
    weights = weights_of(build(made.local.network, seed=seed))
    bare = gradient_of(image, label, weights, made.local, Labels.of(made.agreement))
    number = made.agreement.patients[site] if site else max(made.agreement.patients.values())
    attempt = partial(_attempt, made, image, label, weights, iterations, seed, progress)
    return Inversion(
        mechanism=made.agreement.privacy.mechanism,
        truth=image,
        without=attempt("without", _step(bare, made)),
        protected=attempt("with", _protected(bare, made, number)),
        blank=reconstruction_metrics(np.zeros_like(image), image),
        label=reconstruction_metrics(paint_labels(label, image), image),
    )


def _attempt(
    made: Plan, image: np.ndarray, label: np.ndarray, weights: Arrays, iterations: int, seed: int, progress: Progress,
    name: str, update: Arrays,
) -> Reconstruction:  # fmt: skip
    labels = Labels.of(made.agreement)

    def show(_: str, done: int, total: int) -> None:
        progress(f"reconstructing {name} the mechanism", done, total)

    found = invert_gradient(
        update, weights, label, made.local, labels=labels, iterations=iterations, seed=seed, progress=show
    )
    return Reconstruction(found, reconstruction_metrics(found, image))


def _patch(made: Plan, store: Store | None, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Image (C, *patch) and label map (*patch) of a patient, or made up: the brighter, the higher the label."""
    if store is None:
        image = make_picture(made, generator).reshape(-1, *made.local.training.patch_size)
        values = sorted(Labels.of(made.agreement).values)
        edges = np.quantile(image[0], np.arange(1, len(values)) / len(values))
        return image, np.array(values, np.int16)[np.digitize(image[0], edges)]
    patient = sorted(store.patients)[int(generator.integers(len(store.patients)))]
    image, label = sample_patch(store, patient, made.local.training, IDENTITY, generator)
    return np.ascontiguousarray(image, np.float32), np.ascontiguousarray(label)


def _step(gradient: dict[str, np.ndarray], made: Plan) -> dict[str, np.ndarray]:
    """The update of one plain step along a gradient."""
    return {name: -np.float32(made.local.training.learning_rate) * part for name, part in gradient.items()}


def _protected(gradient: dict[str, np.ndarray], made: Plan, patients: int) -> dict[str, np.ndarray]:
    """What the plan's mechanism releases of a step in which this patient alone was drawn."""
    import torch

    mechanism = privacy.find_mechanism(made, patients).with_key(secrets.token_bytes(32))
    parts = [torch.from_numpy(part) for part in gradient.values()]
    stepped = [part.numpy() for part in mechanism.step([parts], parts)]
    released = mechanism.release({"update": _step(dict(zip(gradient, stepped, strict=True)), made)})
    if "update" not in released:
        raise ValidationErrors("--inversion", [f"{mechanism.name} releases no update"])
    return dict(released["update"])

"""What a training needs whose sites label public images: which these are, and whose network is another one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from autofed import algorithms, plans
from autofed.errors import ValidationErrors, raise_if_any
from autofed.federation.run_folder import Run
from autofed.files import PathLike
from autofed.plans import Plan
from autofed.preprocessing import differences, find_public, public_digests


def resolve_public_folder(run: Run, given: PathLike | None) -> Path | None:
    """Where the public images are: as given now, or as the run was begun with."""
    known = run.identity().public if run.exists else ""
    return Path(given) if given is not None else Path(known) if known else None


def with_public_images(made: Plan, trusted: Collection[str], folder: Path | None, run: Run | None = None) -> Plan:
    """The plan, agreed on the images in a folder if its algorithm labels public images and it names none yet.

    `ValidationErrors` if it has none to label, or names the difference if it, or the run that was begun, agrees on
    others.
    """
    choice = made.agreement.algorithm
    if not algorithms.find(choice.name, trusted).shares_pseudo_labels:
        return made
    if folder is None:
        raise ValidationErrors(
            "--public", [f"with {choice.name} the sites label public images; name a folder that holds them"]
        )
    return with_image_digests(made, folder, run.plan().agreement.public_images if run and run.exists else ())


def with_image_digests(made: Plan, folder: Path, begun: Sequence[str] = ()) -> Plan:
    """The plan, agreed on the public images in a folder; `ValidationErrors` names the difference if others were
    agreed on.
    """
    found = public_digests(find_public(folder, len(made.agreement.channels)))
    for agreed in (made.agreement.public_images, begun):
        raise_if_any(str(folder), differences(agreed, found) if agreed else [])
    return made.model_copy(update={"agreement": made.agreement.model_copy(update={"public_images": found})})


def load_site_plans(
    run: Run, made: Plan, given: Mapping[str, PathLike | Plan], *, is_labelling: bool
) -> dict[str, Plan]:
    """The plans of sites with a network or grid of their own: those given, or those that the run was begun with.

    Each takes over the run's agreement. `ValidationErrors` if it cannot.
    """
    found = {site: plan if isinstance(plan, Plan) else plans.load(plan) for site, plan in given.items()}
    known = made.agreement.patients
    raise_if_any("--site-plan", [f"{site} is no site of the plan, which has {', '.join(known)}" for site in found
                           if site not in known])  # fmt: skip
    if run.exists and is_labelling:
        found = {site: run.site_plan(site) for site in known if (run.folder / "sites" / site / "plan.json").is_file()}
    return {site: _under(plan, made, site) for site, plan in found.items()}


def _under(plan: Plan, made: Plan, site: str) -> Plan:
    return Plan.parse({**plan.model_dump(mode="json"), "agreement": made.agreement.model_dump(mode="json")}, site)

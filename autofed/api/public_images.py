"""Training by labels of public images: where the images are, and which sites have another network or grid."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from autofed import algorithms, plans
from autofed.errors import ValidationErrors, raise_if_any
from autofed.federation.run_folder import Run
from autofed.files import PathLike
from autofed.plans import Plan
from autofed.preprocessing import differences, find_public, public_digests


def resolve_public_folder(run: Run, folder: PathLike | None) -> Path | None:
    """The folder of public images: the one given now, or else the one that the run began with."""
    recorded = run.identity().public if run.exists else ""
    return Path(folder) if folder is not None else Path(recorded) if recorded else None


def with_public_images(plan: Plan, trusted: Collection[str], folder: Path | None, run: Run | None = None) -> Plan:
    """The plan with the digests of the public images, if its algorithm labels such.

    `ValidationErrors` if there is no folder, or if the images differ from those of the plan or of the existing run.
    """
    choice = plan.agreement.algorithm
    if not algorithms.find(choice.name, trusted).shares_pseudo_labels:
        return plan
    if folder is None:
        raise ValidationErrors(
            "--public", [f"with {choice.name} the sites label public images; name a folder that holds them"]
        )
    return with_image_digests(plan, folder, run.plan().agreement.public_images if run and run.exists else ())


def with_image_digests(plan: Plan, folder: Path, recorded: Sequence[str] = ()) -> Plan:
    """The plan with the digests of the public images in a folder.

    `ValidationErrors` names the differences to the images that the plan has already, or to those `recorded` by the run.
    """
    digests = public_digests(find_public(folder, len(plan.agreement.channels)))
    for agreed in (plan.agreement.public_images, recorded):
        raise_if_any(str(folder), differences(agreed, digests) if agreed else [])
    return plan.model_copy(update={"agreement": plan.agreement.model_copy(update={"public_images": digests})})


def load_site_plans(
    run: Run, plan: Plan, sources: Mapping[str, PathLike | Plan], *, is_labelling: bool
) -> dict[str, Plan]:
    """The plans of sites with another network or grid: those given, or those that the run began with.

    Each gets the run's agreement. `ValidationErrors` if it does not fit, or if a site is not in the plan.
    """
    site_plans = {
        site: site_plan if isinstance(site_plan, Plan) else plans.load(site_plan) for site, site_plan in sources.items()
    }
    sites = plan.agreement.patients
    raise_if_any("--site-plan", [f"{site} is no site of the plan, which has {', '.join(sites)}" for site in site_plans
                           if site not in sites])  # fmt: skip
    if run.exists and is_labelling:
        site_plans = {
            site: run.site_plan(site) for site in sites if (run.folder / "sites" / site / "plan.json").is_file()
        }
    return {site: _with_agreement_of(site_plan, plan, site) for site, site_plan in site_plans.items()}


def _with_agreement_of(site_plan: Plan, plan: Plan, site: str) -> Plan:
    return Plan.parse({**site_plan.model_dump(mode="json"), "agreement": plan.agreement.model_dump(mode="json")}, site)

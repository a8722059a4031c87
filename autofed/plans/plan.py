"""The plan as a whole: its sections, what no single section can see, and reading it back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from autofed.data.labels import Labels
from autofed.errors import ValidationErrors, raise_if_any
from autofed.files import Record, read_json
from autofed.plans import changes
from autofed.plans.agreement import Agreement, spaced_snapshots
from autofed.plans.budget import Budget
from autofed.plans.local import Inference, LocalPlan
from autofed.plans.reasons import Reason

VERSION: Literal[1] = 1


class Plan(Record):
    """Everything that the sites follow. `agreement` is what they vet; `reasons` say why each value is what it is."""

    version: Literal[1] = VERSION
    budget: Budget
    agreement: Agreement
    local: LocalPlan
    inference: Inference
    reasons: tuple[Reason, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        problems = _problems(self)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def without_reasons(self) -> Plan:
        """The plan without its history: two plans that ask for the same thing are equal in this form."""
        return self.model_copy(update={"reasons": ()})

    def steps_at(self, site: str) -> int:
        """The local steps that a site takes in a round."""
        return self.agreement.training.steps_at.get(site, self.local.training.steps_per_round)

    def batches_at(self, site: str) -> int:
        """How many batches are as many patches as a step sees of a site's patients: more than one where it is private.

        Patients that are drawn by a coin each are as many as expected. Who is no site counts as one of mean size.
        """
        privacy, patients = self.agreement.privacy, self.agreement.patients
        if privacy.sampling_rate is None or privacy.patches_per_patient is None:
            return 1
        site_patients = patients.get(site, sum(patients.values()) / len(patients))
        return max(
            1,
            round(privacy.sampling_rate * site_patients * privacy.patches_per_patient / self.local.training.batch_size),
        )

    def extend(self, rounds: int) -> Plan:
        """The plan of a training that has come to its end and goes on to `rounds` rounds, without a jump.

        The ensemble keeps old snapshots where the new rounds are too few for it. `ValidationErrors` if that is not
        longer than planned, or if the plan is private: its noise is for the rounds planned.
        """
        training = self.agreement.training
        problems = []
        if rounds <= training.rounds:
            problems.append(f"{rounds} rounds were asked for, {training.rounds} are planned; expected more")
        if self.agreement.privacy.is_private:
            problems.append("the noise of a private plan is made for its rounds; plan again and begin a new run")
        raise_if_any("--rounds", problems)
        snapshots = spaced_snapshots(rounds)
        late = [s for s in snapshots if s > training.rounds]
        early = training.snapshots[-(len(snapshots) - len(late)) :] if len(late) < len(snapshots) else ()
        return self.change({
            "agreement.training.rounds": rounds,
            "agreement.training.snapshots": [*early, *late],
            "agreement.training.extended": [*training.extended, training.rounds],
        })  # fmt: skip

    def change(self, assignments: Mapping[str, Any], why: str | Mapping[str, str] = "") -> Plan:
        """A plan with some fields set by hand (or for another reason, `why`), each recorded as a reason.

        A field is named by its path or by any ending of it that is unique: `training.rounds`, `batch_size`.
        `ValidationErrors` names every field that does not exist, is ambiguous, or takes another kind of value.
        """
        content = self.model_dump(mode="json", exclude={"reasons"})
        tree, reasons = changes.apply(Plan, content, self.reasons, assignments, why)
        return Plan.parse(tree, "the plan with --set").model_copy(update={"reasons": reasons})

    def with_reason(self, field: str, value: str, why: str) -> Plan:
        """The same plan with one more reason, of something that it has no field for."""
        reasons = self.without_reason(field).reasons
        return self.model_copy(update={"reasons": (*reasons, Reason(field=field, value=value, why=why))})

    def without_reason(self, field: str) -> Plan:
        """The same plan without the reason of a field."""
        return self.model_copy(update={"reasons": tuple(reason for reason in self.reasons if reason.field != field)})


def unknown_fields(names: Iterable[str]) -> list[str]:
    """What is wrong with names of fields of a plan that are to be set by hand."""
    return changes.unknown_fields(Plan, names)


def _problems(plan: Plan) -> list[str]:
    """What no single section can see: that patch, network, grid and agreement fit together."""
    return [*_axes_problems(plan), *_count_problems(plan), *_mirror_problems(plan), *_privacy_problems(plan)]


def _privacy_problems(plan: Plan) -> list[str]:
    mechanism = plan.agreement.privacy.mechanism
    if plan.agreement.privacy.by_patient and plan.local.training.batch_dice:
        conflict = f"local.training.batch_dice couples the patients of a batch, and {mechanism} bounds each by itself"
        return [f"{conflict}; write false"]
    return []


def _axes_problems(plan: Plan) -> list[str]:
    network, patch, dimension = plan.local.network, plan.local.training.patch_size, plan.agreement.dimension
    problems = []
    configuration = plan.local.geometry.configuration
    axes = plan.local.axes
    if dimension == 2 and plan.local.geometry.transpose[0] != 0:
        transpose = list(plan.local.geometry.transpose)
        problems.append(f"local.geometry.transpose must begin with 0, the one slice of a picture, found {transpose}")
    if axes > dimension:
        problems.append(f"local.geometry.configuration is {configuration}, but the data are pictures; write 2d")
    if len(patch) != axes:
        problems.append(f"local.training.patch_size has {len(patch)} axes in a {configuration} plan; write {axes}")
    elif any(len(s) != axes for s in (*network.strides, *network.kernels)):
        problems.append(f"local.network.strides and kernels need {axes} axes each in a {configuration} plan")
    elif any(p % d for p, d in zip(patch, network.divisor, strict=True)):
        nearest = [max(d, round(p / d) * d) for p, d in zip(patch, network.divisor, strict=True)]
        problems.append(
            f"local.training.patch_size {list(patch)} must be a multiple of {list(network.divisor)}; write {nearest}"
        )
    if plan.local.training.precision == "bfloat16" and not problems and network.is_thin(patch):
        problems.append(
            f"a patch of {list(patch)} becomes two voxels deep, where gradients in bfloat16 can be wrong on a CPU; "
            "write local.training.precision float32, or a deeper patch"
        )
    return problems


def _count_problems(plan: Plan) -> list[str]:
    network, agreement = plan.local.network, plan.agreement
    problems = []
    labels = Labels.of(agreement)
    if network.in_channels != len(agreement.channels) or network.classes != labels.channels:
        kind = "regions" if labels.is_regions else "classes"
        problems.append(
            f"local.network takes {network.in_channels} channels and {network.classes} {kind}, the agreement has "
            f"{len(agreement.channels)} and {labels.channels}"
        )
    if len(plan.local.intensity.channels) != len(agreement.channels):
        problems.append("local.intensity.channels needs one entry per channel of the agreement")
    return problems


def _mirror_problems(plan: Plan) -> list[str]:
    trained, predicted = set(plan.local.training.mirror_axes), set(plan.inference.mirror_axes)
    problems = []
    if not trained <= set(range(plan.local.axes)):
        problems.append(f"mirror_axes may hold 0 to {plan.local.axes - 1}, found {sorted(trained)}")
    if not predicted <= trained:
        problems.append(
            f"inference.mirror_axes {sorted(predicted)} must be among local.training.mirror_axes {sorted(trained)}: "
            "a network knows only the mirror images that it was trained on; set training.mirror_axes, and both follow"
        )
    return problems


def is_plan(path: Path) -> bool:
    """Whether a file looks like a plan, and not like a fingerprint."""
    if path.suffix != ".json" or not path.is_file():
        return False
    value = read_json(path)
    return isinstance(value, dict) and "agreement" in value


def load(path: Path | str) -> Plan:
    """Read a plan; `ValidationErrors` names everything that is wrong with it, and a version that this autofed cannot
    read.
    """
    value = read_json(Path(path))
    if not isinstance(value, dict) or "agreement" not in value:
        raise ValidationErrors(str(path), ["this is not a plan; make one with `autofed plan SITE... -o plan.json`"])
    if value.get("version") != VERSION:
        raise ValidationErrors(
            str(path), [f"the plan has version {value.get('version')!r}, this autofed reads {VERSION}"]
        )
    return Plan.parse(value, str(path))

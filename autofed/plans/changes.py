"""Fields of a plan set by hand: which field a name stands for, and what else changes with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from autofed.errors import raise_if_any
from autofed.files import Record
from autofed.plans import privacy
from autofed.plans.agreement import spaced_snapshots
from autofed.plans.budget import Budget
from autofed.plans.reasons import Code, Reason


def apply(
    record: type[Record],
    tree: dict[str, Any],
    reasons: Sequence[Reason],
    assignments: Mapping[str, Any],
    why: str | Mapping[str, str] = "",
) -> tuple[dict[str, Any], tuple[Reason, ...]]:
    """The content of a plan with some fields set by hand and what follows from them, and its reasons with one for each.

    `ValidationErrors` names every field that is not there or ambiguous.

    Args:
        record: the plan's type.
        tree: its content, which is changed in place.
        reasons: those of the plan so far.
        assignments: field, by its path or a unique ending of it, to value.
        why: the reason if it was not by hand, of all fields or by the name that each was given.
    """
    raise_if_any("--set", unknown_fields(record, assignments))
    paths = {name: _resolve(record, name)[0] for name in assignments}
    values = {paths[name]: value for name, value in assignments.items()}
    whys = {path: why if isinstance(why, str) else why.get(name, "") for name, path in paths.items()}
    planned = {reason.field: reason.value for reason in reasons}
    new_reasons = [_reason(path, value, whys[path], planned.get(path)) for path, value in values.items()]
    followers = [
        (path, value, consequence) for path, value, consequence in _followers(values, tree) if path not in values
    ]
    for path, value, consequence in followers:
        code: Code = "by-hand" if path == _COPIED else "planned"
        new_reasons.append(Reason(field=path, value=str(value), why=consequence, code=code))
    for path, value in [*values.items(), *((path, value) for path, value, _ in followers)]:
        _assign(tree, path, value)
    changed = {reason.field for reason in new_reasons}
    changed |= {"local.network"} if any(path.startswith(_SIZES) for path in changed) else set()
    return tree, (*(reason for reason in reasons if reason.field not in changed), *new_reasons)


def unknown_fields(record: type[Record], names: Iterable[str]) -> list[str]:
    """What is wrong with names of fields that are to be set by hand: unknown, ambiguous, of the budget, or twice."""
    resolved = [_resolve(record, name) for name in names]
    paths = [path for path, problem in resolved if not problem]
    repeated = [f"{path} is set {paths.count(path)} times; set it once" for path in dict.fromkeys(paths)
             if paths.count(path) > 1]  # fmt: skip
    return [problem for _, problem in resolved if problem] + repeated


_SIZES = ("local.network.", "local.training.patch_size", "local.training.batch_size", "local.training.precision")
"""What the memory depends on that the reason of `local.network` states."""


_COPIED = "inference.mirror_axes"
"""Takes the value that another field was set to by hand, and so counts as set by hand itself."""


def _reason(path: str, value: Any, why: str, planned: str | None) -> Reason:
    return Reason(field=path, value=str(value), why=why) if why else Reason.by_hand(path, str(value), planned)


def _followers(values: Mapping[str, Any], tree: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """What else changes with the fields that were set by hand, unless it was set too: (field, value, why)."""
    if (rounds := "agreement.training.rounds") in values:
        snapshots = spaced_snapshots(values[rounds])
        yield "agreement.training.snapshots", snapshots, f"the ensemble of {values[rounds]} rounds: late and spaced"
    if (mechanism := "agreement.privacy.mechanism") in values:
        yield from _with_mechanism(values[mechanism], tree)
    if values.get("agreement.training.steps_at") and tree["agreement"]["algorithm"]["name"] == "fedavg":
        yield "agreement.algorithm.name", "fednova", "sites take different numbers of steps, which fedavg lets weigh"
    if (optimiser := "agreement.server.optimiser") in values:
        rate, why = _SERVER_RATES.get(values[optimiser], (1.0, "that of a plain step"))
        yield "agreement.server.rate", rate, why
    if (mirrored := "local.training.mirror_axes") in values:
        yield _COPIED, values[mirrored], "as in training, which was set by hand"


def _with_mechanism(name: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """What a mechanism takes that was named by hand: its own fields and no others, and a training that fits it."""
    settings, needed = tree["agreement"]["privacy"], privacy.needs(name)
    lasting = ("census_noise",) if name == privacy.NONE else ("mechanism", *privacy.GUARANTEE_FIELDS)
    for field, value in settings.items():
        if field in needed and value is None:
            yield f"agreement.privacy.{field}", privacy.default(name, field), f"where {name} begins"
        elif field not in (*lasting, *needed, "mechanism") and value is not None:
            yield f"agreement.privacy.{field}", None, f"{name} is another mechanism than before"
    if name == privacy.NONE and settings["mechanism"] != privacy.NONE:
        yield "agreement.training.validate_every", 1, "an open training may be scored"
        yield "agreement.training.ema", 0.0, "there is no noise to average away"
    if name != privacy.NONE:
        yield "agreement.training.validate_every", 0, "a private training chooses nothing by scores"
        yield "agreement.training.ema", PRIVATE_EMA, "an average of rounds has less of their noise, and costs nothing"
    if name in privacy.BY_PATIENT:
        yield "local.training.batch_dice", False, "a gradient is one patient's"


PRIVATE_EMA = 0.8
"""Share of the old value in the average over rounds that is the model of a private training."""

_SERVER_RATES = {
    "momentum": (1.0, "in short trainings .1 and .3 did not get far enough"),
    "adam": (0.03, "so far a weight moves in a round, however large the sites' updates are"),
}
"""Where to begin with the coordinator's optimisers (docs/how-to/algorithms.md says what was tried)."""


def _resolve(record: type[Record], name: str) -> tuple[str, str]:
    """The full path of the field that a name or its unique ending stands for, or else what is wrong with the name."""
    paths = [path for path in _leaves(record) if not path.startswith("budget.")]
    matches = [path for path in paths if path == name] or [path for path in paths if path.endswith("." + name)]
    if len(matches) == 1:
        return matches[0], ""
    if matches:
        return "", f"{name} could be {' or '.join(matches)}; write the longer name"
    last = name.rsplit(".", maxsplit=1)[-1]
    if last in Budget.model_fields and name in (last, f"budget.{last}"):
        return "", f"{name} only says what the plan was made for; {_INSTEAD.get(last, 'plan again')}"
    close = [".".join(path.split(".")[-2:]) for path in paths if last[:4] in path.rsplit(".", maxsplit=1)[-1]]
    return "", f"there is no field {name} in a plan; did you mean one of: {', '.join(close or paths)}"


_INSTEAD = {
    "memory_gb": "plan again with --memory",
    "hours": "plan again with --hours",
    "device": "plan again with --device",
    "preset": "plan again with --preset",
    "speed": "it is measured when the plan is made",
    "epsilon": "set agreement.privacy.epsilon",
    "delta": "set agreement.privacy.delta",
}


def _leaves(record: type[Record], prefix: str = "") -> Iterator[str]:
    for name, field in record.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Record):
            yield from _leaves(field.annotation, f"{prefix}{name}.")
        elif name not in ("reasons", "version"):
            yield prefix + name


def _assign(tree: dict[str, Any], path: str, value: Any) -> None:
    *sections, last = path.split(".")
    for key in sections:
        tree = tree[key]
    tree[last] = value

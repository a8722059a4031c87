"""From the sites' folders to a run: plan, preprocess, train; called again, it continues where it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, cast

from autofed import plans
from autofed.api.options import PLAN_OPTIONS, PlanKeywords, RunKeywords, RunOptions, takes
from autofed.api.planning import plan
from autofed.api.preprocessing import preprocess
from autofed.api.training import train
from autofed.data import site_folders
from autofed.errors import ValidationErrors, raise_if_any
from autofed.federation.run_folder import OPTIONS, Run
from autofed.files import PathLike, read_json, write_json
from autofed.plans import Plan

PLAN = "plan.json"
_CHANGEABLE = ("folds", "public")
"""Options that a later call may change: another fold is trained in addition to the existing ones."""
_STORED = (*PLAN_OPTIONS, *_CHANGEABLE, "work", "simulation")


@takes(RunOptions)
def run(sites: Sequence[PathLike], output: PathLike, **keywords: Unpack[RunKeywords]) -> Run:
    """Plan for the sites, preprocess their data and train them on this machine, into the folder `output`.

    The plan is RUN/plan.json. Preprocessed data and the sites' ledgers are in `work`, by default the folder `work`
    beside RUN: further runs share it, so that their privacy costs add up. Called again, it continues where it was
    interrupted; `ValidationErrors` if the options then differ in a way that would give another plan.

    Args:
        sites: The sites' folders in nnU-Net's raw layout, or one that holds such in `sites`.
        output: RUN, the folder of the run.
        **keywords: The fields of `autofed.api.options.RunOptions`.
    """
    run_folder, stored = (
        Run(output),
        {name: _as_json(name, value) for name, value in keywords.items() if name in _STORED},
    )
    previous = _stored_options(run_folder)
    raise_if_any(str(run_folder.folder), [] if previous is None else _differences(previous, stored))
    options = RunOptions(**{**(previous or {}), **keywords})
    work = run_folder.folder.resolve().parent / "work" if options.work is None else Path(options.work)
    run_plan = _load_plan(sites, run_folder) if previous is not None else _new_plan(sites, run_folder, options, stored)
    options.say(f"the plan is {run_folder.folder / PLAN}; preprocessed data and ledgers are in {work}")
    preprocess(run_plan, sites, work, processes=options.processes, progress=options.progress)
    return train(
        run_plan, work, run_folder.folder, public=options.public, folds=options.folds, simulation=options.simulation,
        device=options.device, resume=run_folder.exists, progress=options.progress,
    )  # fmt: skip


def _stored_options(folder: Run) -> dict[str, Any] | None:
    """The options that the run was planned with; None for a new run.

    `ValidationErrors` if the folder holds something else, or a run that `run` did not begin.
    """
    if not (folder.folder / PLAN).is_file():
        folder.refuse_foreign()
        return None
    if not (folder.folder / OPTIONS).is_file():
        raise ValidationErrors(
            str(folder.folder),
            ["it was not begun by `autofed run`; continue it with `autofed train --resume`, or give another folder"],
        )
    return dict(read_json(folder.folder / OPTIONS))


def _differences(previous: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Options that differ from those that the run was planned with."""
    changed = [n for n in current if n not in _CHANGEABLE and (n not in previous or previous[n] != current[n])]
    previously = {
        name: f"with {name} {previous[name]!r}" if name in previous else f"without {name}" for name in changed
    }
    return [
        f"it was begun {previously[name]}, now {name} is {current[name]!r}; leave {name} out, or give another folder"
        for name in changed
    ]


def _new_plan(sites: Sequence[PathLike], folder: Run, options: RunOptions, stored: Mapping[str, Any]) -> Plan:
    """A new plan, saved together with the options that it was made from."""
    _refuse_files(sites)
    choices = {name: getattr(options, name) for name in (*PLAN_OPTIONS, "processes", "progress")}
    result = plan(sites, None, **cast("PlanKeywords", choices))
    write_json(folder.folder / OPTIONS, stored)
    result.save(folder.folder / PLAN)
    return result


def _load_plan(sites: Sequence[PathLike], folder: Run) -> Plan:
    """The plan of the run; `ValidationErrors` if it was made for other sites."""
    run_plan = plans.load(folder.folder / PLAN)
    sites_here = {site.resolve().name for site in site_folders(sites)}
    sites_planned = set(run_plan.agreement.patients)
    planned, here = (", ".join(sorted(sites)) for sites in (sites_planned, sites_here))
    problem = f"it was planned for {planned}, found {here}; name the same sites"
    raise_if_any(str(folder.folder), [] if sites_here == sites_planned else [problem])
    return run_plan


def _refuse_files(sites: Sequence[PathLike]) -> None:
    """`ValidationErrors` for a file among the sites: a plan can be made from a fingerprint, but not a training."""
    raise_if_any(
        "run", [f"{site} is a file; name the folder of the site's data" for site in sites if Path(site).is_file()]
    )


def _as_json(name: str, value: Any) -> Any:
    """An option's value as JSON stores it; a folder as an absolute path."""
    if name in ("work", "public") and value is not None:
        return str(Path(value).resolve())
    return json.loads(json.dumps(dict(value) if isinstance(value, Mapping) else value))

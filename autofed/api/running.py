"""The whole way from the sites' folders to a run: plan, preprocess, train; again, it goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, cast

from autofed import plans
from autofed.api.options import PLANNED, PlanKeywords, RunKeywords, RunOptions, takes
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
"""What may be asked for anew: another fold is trained beside those that there are."""
_STORED = (*PLANNED, *_CHANGEABLE, "work", "simulation")


@takes(RunOptions)
def run(sites: Sequence[PathLike], output: PathLike, **keywords: Unpack[RunKeywords]) -> Run:
    """Plan for the sites, preprocess their data and train them on this machine, into the folder `output`.

    The plan is RUN/plan.json. Prepared data and the sites' ledgers are in `work`, by default the folder `work` beside
    RUN: further runs share it, and what they cost their patients counts together. Called again, it goes on where it was
    interrupted; `ValidationErrors` if what was asked for then would have given another plan.

    Args:
        sites: The sites' folders in nnU-Net's raw layout, or one that holds such in `sites`.
        output: RUN, the folder that the run is kept in.
        **keywords: The fields of `autofed.api.options.RunOptions`.
    """
    folder, given = Run(output), {name: _plain(name, value) for name, value in keywords.items() if name in _STORED}
    begun = _stored(folder)
    raise_if_any(str(folder.folder), [] if begun is None else _differences(begun, given))
    options = RunOptions(**{**(begun or {}), **keywords})
    work = folder.folder.resolve().parent / "work" if options.work is None else Path(options.work)
    made = _begun(sites, folder) if begun is not None else _planned(sites, folder, options, given)
    options.say(f"the plan is {folder.folder / PLAN}; prepared data and ledgers are in {work}")
    preprocess(made, sites, work, processes=options.processes, progress=options.progress)
    return train(
        made, work, folder.folder, public=options.public, folds=options.folds, simulation=options.simulation,
        device=options.device, resume=folder.exists, progress=options.progress,
    )  # fmt: skip


def _stored(folder: Run) -> dict[str, Any] | None:
    """What was asked for when the run was planned; None if nothing was yet. `ValidationErrors` if it was begun
    otherwise.
    """
    if not (folder.folder / PLAN).is_file():
        folder.refuse_foreign()
        return None
    if not (folder.folder / OPTIONS).is_file():
        raise ValidationErrors(
            str(folder.folder),
            ["it was not begun by `autofed run`; go on with `autofed train --resume`, or give another folder"],
        )
    return dict(read_json(folder.folder / OPTIONS))


def _differences(begun: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """What is asked for now and would have given another plan, or other places."""
    others = [n for n in given if n not in _CHANGEABLE and (n not in begun or begun[n] != given[n])]
    before = {name: f"with {name} {begun[name]!r}" if name in begun else f"without {name}" for name in others}
    return [
        f"it was begun {before[name]}, and is asked for {given[name]!r} now; leave {name} out, or give another folder"
        for name in others
    ]


def _planned(sites: Sequence[PathLike], folder: Run, options: RunOptions, given: Mapping[str, Any]) -> Plan:
    """A new plan, and beside it what was asked for."""
    _refuse_files(sites)
    wanted = {name: getattr(options, name) for name in (*PLANNED, "processes", "progress")}
    made = plan(sites, None, **cast("PlanKeywords", wanted))
    write_json(folder.folder / OPTIONS, given)
    made.save(folder.folder / PLAN)
    return made


def _begun(sites: Sequence[PathLike], folder: Run) -> Plan:
    """The plan of the run; `ValidationErrors` if the sites are not those that it was made for."""
    made = plans.load(folder.folder / PLAN)
    here, planned = {site.resolve().name for site in site_folders(sites)}, set(made.agreement.patients)
    found = f"it was planned for {', '.join(sorted(planned))}, and found {', '.join(sorted(here))}; name the same sites"
    raise_if_any(str(folder.folder), [] if here == planned else [found])
    return made


def _refuse_files(sites: Sequence[PathLike]) -> None:
    """A fingerprint can be planned for, but not trained on."""
    raise_if_any(
        "run", [f"{site} is a file; name the folder of the site's data" for site in sites if Path(site).is_file()]
    )


def _plain(name: str, value: Any) -> Any:
    """As JSON has it; a place as it is called from everywhere."""
    if name in ("work", "public") and value is not None:
        return str(Path(value).resolve())
    return json.loads(json.dumps(dict(value) if isinstance(value, Mapping) else value))

"""Training over sites on machines of their own: begun at the keyboard, led at the SuperLink, both on one machine.

`submit` has Flower ship an app without any code in it; the SuperLink then starts `server_app`, which runs the same
loop on the run's folder as a training on one machine.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from autofed import __version__, algorithms
from autofed.api.coordinator import Coordinator
from autofed.api.options import Say, quiet
from autofed.data.splits import ALL
from autofed.errors import ValidationErrors, raise_if_any
from autofed.federation import checkpoints
from autofed.federation.node import SiteNode, open_public_of, request_name
from autofed.federation.run_folder import Run
from autofed.federation.transports.flower import commands, node
from autofed.federation.transports.flower.transport import OverFlower, serve
from autofed.files import PathLike
from autofed.parallel import Progress
from autofed.plans import Plan
from autofed.training.devices import pick_device

_APP = f"""
[project]
name = "autofed"
version = "{__version__}"
description = "Names the parts of autofed that Flower starts; every machine has them installed."
license = "Apache-2.0"

[tool.flwr.app]
publisher = "autofed"

[tool.flwr.app.components]
serverapp = "autofed.api.over_flower:server_app"
clientapp = "autofed.federation.transports.flower.client_app:client_app"

[tool.flwr.app.config]
run = ""
fold = "all"
"""


# --- at the SuperLink


def _lead(config: Mapping[str, Any], reach: Callable[[Plan, str], OverFlower], say: Say) -> None:
    """Lead a fold of the run in `config` to its end."""
    run, fold = Run(str(config["run"])), str(config["fold"])
    if not run.exists:
        where = "the SuperLink finds no run there; run `autofed train --connection` on the machine of the SuperLink"
        raise ValidationErrors(str(run.folder), [where])
    plan, identity = run.plan(), run.identity()
    public = open_public_of(plan, Path(identity.public) if identity.public else None, run.folder)
    coordinator = Coordinator(
        run, plan, algorithms.make(plan.agreement.algorithm), identity, public, pick_device("auto")
    )
    begun = bool(checkpoints.saved_rounds(run.fold_folder(fold)))
    sites = reach(plan, request_name(identity.id, fold))
    sites.meet(least=plan.agreement.faults.least_sites if begun else None, holding_out=fold != ALL)

    def transport(requests: Mapping[str, bytes]) -> Mapping[str, bytes]:
        begin = time.monotonic()
        answers = sites(requests)
        rounds = plan.agreement.training.rounds
        at = min(run.finished(fold) + 1, rounds)
        found = f"{len(answers)} of {len(requests)} sites answered"
        say(f"round {at} of {rounds}: {found} in {time.monotonic() - begin:.0f} s")
        return answers

    coordinator.train(fold, transport)


server_app = serve(_lead)


# --- at a site


def serve_site(
    premises: SiteNode,
    superlink: str,
    *,
    key: PathLike | None = None,
    authority: PathLike | None = None,
    say: Say = quiet,
) -> None:
    """Take part as a site in every run by its plan that the SuperLink at HOST:PORT leads, until this process is ended.

    `premises` says where the site has what it needs, `key` and `authority` are files. `ValidationErrors` before that if
    it could take part in no run.
    """
    premises = premises.resolved()
    premises.check()
    mine, root = (None if path is None else Path(path).resolve() for path in (key, authority))
    raise_if_any("site", [f"{path}: there is no such file" for path in (mine, root) if path and not path.is_file()])
    node.serve(premises, superlink, mine, root, say)


# --- at the coordinator's keyboard


def submit(coordinator: Coordinator, fold: str, connection: str, say: Say, progress: Progress) -> None:
    """Have a SuperLink lead a fold of a run to its end; `ValidationErrors` says why it did not come to a good one."""
    run, rounds = coordinator.run, coordinator.plan.agreement.training.rounds
    with tempfile.TemporaryDirectory() as folder:
        app = Path(folder) / "autofed"
        app.mkdir()
        (app / "pyproject.toml").write_text(_APP, encoding="utf-8")
        config = Path(folder) / "run.toml"
        values = {"run": str(run.folder.resolve()), "fold": fold}
        config.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items()), encoding="utf-8")
        started = commands.ask("run", str(app), connection, "--run-config", str(config))
    number = started["run-id"]
    try:
        for line in commands.stream(number, connection):
            say(line)
            progress("training", run.finished(fold), rounds)
    except KeyboardInterrupt:
        commands.ask("stop", number, connection)
        raise
    _refuse_bad_end(number, connection)


def _refuse_bad_end(number: str, connection: str) -> None:
    status = ""
    while not status.startswith("finished"):  # the last lines come a moment before the end
        (found,) = commands.ask("list", connection, "--run-id", number)["runs"]
        status = found["status"]
        time.sleep(1)
    if status != "finished:completed":
        details = str(found["status-details"]).removeprefix("ServerApp failed with exception: ")
        raise ValidationErrors(f"run {number} at {connection}", [f"{details or status}; go on with --resume"])

"""Training over sites on machines of their own, connected by Flower. The coordinator runs on the SuperLink's machine.

`submit` starts a Flower run whose app contains no code; the SuperLink then starts `server_app` (installed with
autofed), which runs the same loop on the run's folder as a training on one machine.
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


def _coordinate_fold(config: Mapping[str, Any], reach: Callable[[Plan, str], OverFlower], say: Say) -> None:
    """Coordinate a fold of the run that `config` names, to its end."""
    run, fold = Run(str(config["run"])), str(config["fold"])
    if not run.exists:
        problem = "the SuperLink finds no run there; run `autofed train --connection` on the machine of the SuperLink"
        raise ValidationErrors(str(run.folder), [problem])
    plan, identity = run.plan(), run.identity()
    public = open_public_of(plan, Path(identity.public) if identity.public else None, run.folder)
    coordinator = Coordinator(
        run, plan, algorithms.make(plan.agreement.algorithm), identity, public, pick_device("auto")
    )
    has_begun = bool(checkpoints.saved_rounds(run.fold_folder(fold)))
    sites = reach(plan, request_name(identity.id, fold))
    sites.meet(least=plan.agreement.faults.least_sites if has_begun else None, holding_out=fold != ALL)

    def reporting(requests: Mapping[str, bytes]) -> Mapping[str, bytes]:
        began = time.monotonic()
        responses = sites(requests)
        rounds = plan.agreement.training.rounds
        round_number = min(run.finished(fold) + 1, rounds)
        counts = f"{len(responses)} of {len(requests)} sites answered"
        say(f"round {round_number} of {rounds}: {counts} in {time.monotonic() - began:.0f} s")
        return responses

    coordinator.train(fold, reporting)


server_app = serve(_coordinate_fold)


# --- at a site


def serve_site(
    site: SiteNode,
    superlink: str,
    *,
    key: PathLike | None = None,
    authority: PathLike | None = None,
    say: Say = quiet,
) -> None:
    """Serve requests of every run of the site's plan at a SuperLink, until this process is ended.

    Args:
        site: The site's plan, preprocessed data, state folder and device.
        superlink: The address of the SuperLink, HOST:PORT.
        key: The file of the site's private key; None for an insecure connection.
        authority: The file of the certificate that signed the SuperLink's; None for an insecure connection.
        say: Called with each message.

    Raises:
        ValidationErrors: If the site could take part in no run, before it connects.
    """
    site = site.resolved()
    site.check()
    key_path, authority_path = (None if path is None else Path(path).resolve() for path in (key, authority))
    raise_if_any(
        "site", [f"{path}: there is no such file" for path in (key_path, authority_path) if path and not path.is_file()]
    )
    node.serve(site, superlink, key_path, authority_path, say)


# --- where the training is started


def submit(coordinator: Coordinator, fold: str, connection: str, say: Say, progress: Progress) -> None:
    """Train a fold of a run at a SuperLink, to its end; `ValidationErrors` with the reason if that fails."""
    run, rounds = coordinator.run, coordinator.plan.agreement.training.rounds
    with tempfile.TemporaryDirectory() as folder:
        app = Path(folder) / "autofed"
        app.mkdir()
        (app / "pyproject.toml").write_text(_APP, encoding="utf-8")
        config = Path(folder) / "run.toml"
        values = {"run": str(run.folder.resolve()), "fold": fold}
        config.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items()), encoding="utf-8")
        submission = commands.ask("run", str(app), connection, "--run-config", str(config))
    run_id = submission["run-id"]
    try:
        for line in commands.stream(run_id, connection):
            say(line)
            progress("training", run.finished(fold), rounds)
    except KeyboardInterrupt:
        commands.ask("stop", run_id, connection)
        raise
    _raise_unless_completed(run_id, connection)


def _raise_unless_completed(run_id: str, connection: str) -> None:
    status = ""
    while not status.startswith("finished"):  # the log's last lines arrive shortly before the status
        (run,) = commands.ask("list", connection, "--run-id", run_id)["runs"]
        status = run["status"]
        time.sleep(1)
    if status != "finished:completed":
        details = str(run["status-details"]).removeprefix("ServerApp failed with exception: ")
        raise ValidationErrors(f"run {run_id} at {connection}", [f"{details or status}; go on with --resume"])

"""Training over sites on machines of their own: begun at the keyboard, led at the SuperLink, both on one machine.

`submit` has Flower ship an app without any code in it; the SuperLink then starts `server_app`, which runs the same
loop on the run's folder as a training on one machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from autofed import __version__, algorithms
from autofed.federation import flower, states
from autofed.federation.premises import request_name
from autofed.parallel import Progress
from autofed.plans import Plan
from autofed.problems import Problems
from autofed.runs import Run
from autofed.splits import ALL
from autofed.verbs.coordinator import Coordinator

Say = Callable[[str], None]

_APP = f"""
[project]
name = "autofed"
version = "{__version__}"
description = "Names the parts of autofed that Flower starts; every machine has them installed."
license = "Apache-2.0"

[tool.flwr.app]
publisher = "autofed"

[tool.flwr.app.components]
serverapp = "autofed.verbs.hospitals:server_app"
clientapp = "autofed.federation.flower:client_app"

[tool.flwr.app.config]
run = ""
fold = "all"
"""

_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
_FLWR = f"import os; os.environ.update({_QUIET}); from flwr.cli.app import app; app()"
"""Flower's own command line without its reports and its check for updates, which are settled before it is imported."""


# --- at the SuperLink


def _lead(config: Mapping[str, Any], reach: Callable[[Plan, str], flower.OverFlower], say: Say) -> None:
    """Lead a fold of the run in `config` to its end."""
    run, fold = Run(str(config["run"])), str(config["fold"])
    if not run.exists:
        where = "the SuperLink finds no run there; run `autofed train --connection` on the machine of the SuperLink"
        raise Problems(str(run.folder), [where])
    plan, identity = run.plan(), run.identity()
    coordinator = Coordinator(run, plan, algorithms.make(plan.agreement.algorithm), identity)
    begun = bool(states.saved_rounds(run.fold_folder(fold)))
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


server_app = flower.serve(_lead)


# --- at the keyboard


def submit(coordinator: Coordinator, fold: str, connection: str, say: Say, progress: Progress) -> None:
    """Have a SuperLink lead a fold of a run to its end; `Problems` says why it did not come to a good one."""
    run, rounds = coordinator.run, coordinator.plan.agreement.training.rounds
    with tempfile.TemporaryDirectory() as folder:
        app = Path(folder) / "autofed"
        app.mkdir()
        (app / "pyproject.toml").write_text(_APP, encoding="utf-8")
        config = Path(folder) / "run.toml"
        values = {"run": str(run.folder.resolve()), "fold": fold}
        config.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items()), encoding="utf-8")
        started = _ask_flower("run", str(app), connection, "--run-config", str(config))
    number = started["run-id"]
    try:
        for line in _stream(number, connection):
            say(line)
            progress("training", run.finished(fold), rounds)
    except KeyboardInterrupt:
        _ask_flower("stop", number, connection)
        raise
    _refuse_bad_end(number, connection)


def _stream(number: str, connection: str) -> Iterator[str]:
    """What the run says, line by line, until it ends."""
    command = [sys.executable, "-c", _FLWR, "log", number, connection, "--stream"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            yield line.rstrip()


def _refuse_bad_end(number: str, connection: str) -> None:
    status = ""
    while not status.startswith("finished"):  # the last lines come a moment before the end
        (found,) = _ask_flower("list", connection, "--run-id", number)["runs"]
        status = found["status"]
        time.sleep(1)
    if status != "finished:completed":
        details = str(found["status-details"]).removeprefix("ServerApp failed with exception: ")
        raise Problems(f"run {number} at {connection}", [f"{details or status}; go on with --resume"])


def _ask_flower(*words: str) -> dict[str, Any]:
    """What a command of Flower's says in its JSON; `Problems` with its own words if it fails."""
    command = [sys.executable, "-c", _FLWR, *words, "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout)
    except json.JSONDecodeError:
        found = {}
    if not found.get("success"):
        said = found.get("error-message") or done.stderr or done.stdout
        raise Problems(f"flwr {words[0]}", [str(said).strip() or f"it ended with {done.returncode}"])
    return found

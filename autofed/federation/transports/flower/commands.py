"""Flower's own programs as commands, without their reports and their check for updates."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from autofed.errors import ValidationErrors

_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
# Both are read from the environment, the first when Flower is imported.
_BEGIN = f"import os; os.environ.update({_QUIET}); "
_TOOL = _BEGIN + "from flwr.cli.app import app; app()"
_NODE = _BEGIN + (
    "from flwr.supercore.app_utils import start_parent_process_monitor as watch; watch(os.getppid()); "
    "from flwr.supernode.cli import flower_supernode as run; run()"
)


def ask(*words: str) -> dict[str, Any]:
    """What `flwr` reports as JSON; `ValidationErrors` with its own message if it fails."""
    command = [sys.executable, "-c", _TOOL, *words, "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        report = {}
    if not report.get("success"):
        message = report.get("error-message") or done.stderr or done.stdout
        raise ValidationErrors(f"flwr {words[0]}", [str(message).strip() or f"it ended with {done.returncode}"])
    return report


def stream(number: str, connection: str) -> Iterator[str]:
    """The log of a run, line by line, until it ends."""
    command = [sys.executable, "-c", _TOOL, "log", number, connection, "--stream"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            yield line.rstrip()


def start_node(*words: str) -> subprocess.Popen[bytes]:
    """A SuperNode, which ends when this process does."""
    return subprocess.Popen([sys.executable, "-c", _NODE, *words])

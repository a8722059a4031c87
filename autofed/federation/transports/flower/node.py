"""A site's end: its SuperNode, started and started again, and the one process that answers what it receives."""

from __future__ import annotations

import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from autofed.federation.node import SiteNode
from autofed.federation.transports.flower import commands
from autofed.federation.transports.flower.worker import work

AGAIN_SECONDS = 65.0
"""Until a SuperLink has noticed that a node was cut off, it refuses the same key; that takes about 60 s."""

_LOOPBACK = "127.0.0.1"


def serve(
    site_node: SiteNode, superlink: str, key: Path | None, authority: Path | None, say: Callable[[str], None]
) -> None:
    """Take part as this site until the process is ended. Nothing of it is reachable from outside this machine.

    `superlink` is its HOST:PORT, `key` the private key that the coordinator registered, `authority` the certificate
    that the SuperLink's own is signed with; without either, neither end authenticates the other, for trying it out.
    """
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder) / "secret"
        secret.write_bytes(secrets.token_bytes(32))
        while True:
            address = f"{_LOOPBACK}:{_free_port()}"
            node = commands.start_node(*_words(superlink, key, authority, address, secret))
            try:
                work(address, secret.read_bytes(), site_node.model_dump(mode="json"), partial(_is_running, node))
            finally:
                _end(node)
            say(f"the SuperNode ended with the code {node.returncode}; it is started again in {AGAIN_SECONDS:.0f} s")
            time.sleep(AGAIN_SECONDS)


def _is_running(node: subprocess.Popen[bytes]) -> bool:
    return node.poll() is None


def _words(superlink: str, key: Path | None, authority: Path | None, address: str, secret: Path) -> list[str]:
    host, port = address.split(":")
    words = ["--superlink", superlink, "--host", host, "--port", port]
    words += ["--isolation", "process", "--superexec-auth-secret-file", str(secret)]
    words += ["--root-certificates", str(authority)] if authority else ["--insecure"]
    return words + (["--auth-supernode-private-key", str(key)] if key else [])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _end(node: subprocess.Popen[bytes]) -> None:
    node.terminate()
    try:
        node.wait(10)
    except subprocess.TimeoutExpired:
        node.kill()
        node.wait()

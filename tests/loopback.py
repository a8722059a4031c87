"""A SuperLink and SuperNodes on this machine, as between hospitals: TLS, a key for every node, all of it taken down."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOUSE = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
CONNECTION = "hospitals"
LOCALHOST = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as found:
        found.bind((LOCALHOST, 0))
        return found.getsockname()[1]


class Network:
    """To be used in a `with` statement: its processes end with it, whatever happens. Their output is in root/*.log."""

    def __init__(self, root: Path):
        self.root, self.port, self.processes = root, free_port(), {}
        self.env = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(HOUSE),
            "FLWR_HOME": str(root / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }

    def __enter__(self) -> Network:
        write_certificates(self.root)
        (self.root / "flwr").mkdir()
        (self.root / "flwr" / "config.toml").write_text(
            f'[superlink.{CONNECTION}]\naddress = "{LOCALHOST}:{self.port}"\n'
            f'root-certificates = "{self.root / "ca.crt"}"\n'
        )
        files = [f"--ssl-{kind}={self.root / name}" for kind, name in
                 (("ca-certfile", "ca.crt"), ("certfile", "server.crt"), ("keyfile", "server.key"))]  # fmt: skip
        self.start(
            "superlink", "flower-superlink", *files, "--enable-supernode-auth",
            "--disable-runtime-dependency-installation", "--host", LOCALHOST, "--port", str(self.port),
        )  # fmt: skip
        self.wait_for("superlink", lambda: self._answers(self.port))
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.stop(name)

    def start(self, name: str, *command: str) -> None:
        with open(self.root / f"{name}.log", "a") as log:
            self.processes[name] = subprocess.Popen(
                command, env=self.env, stdout=log, stderr=log, start_new_session=True
            )

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        process = self.processes.pop(name)
        for kind, seconds in ((how, 5), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, kind)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)

    def wait_for(self, name: str, ready, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not ready():
            assert self.processes[name].poll() is None, f"{name} ended:\n{self.log(name)}"
            assert time.monotonic() < end, f"{name} is not ready:\n{self.log(name)}"
            time.sleep(0.2)

    def everything(self, done: subprocess.CompletedProcess) -> str:
        """What a command and all processes said, for the eyes of whoever looks at a failed test."""
        logs = [f"=== {name}\n{self.log(name)}" for name in self.processes]
        return "\n".join([done.stdout, done.stderr, *logs])

    def log(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text()

    def key(self, name: str) -> Path:
        """A new private key for a node; the public one lies beside it."""
        key = ec.generate_private_key(ec.SECP384R1())
        path = self.root / name
        path.write_bytes(key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        ))  # fmt: skip
        path.with_suffix(".pub").write_bytes(
            key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        )
        return path

    def register(self, key: Path, name: str) -> None:
        """Let the SuperLink know a key, by the name of the site that it belongs to."""
        done = self.run("flwr", "supernode", "register", str(key.with_suffix(".pub")), CONNECTION, "--name", name)
        assert done.returncode == 0, done.stdout + done.stderr

    def site(self, name: str, key: Path, plan: Path, work: Path, memory: Path) -> None:
        """Start a site as a hospital does."""
        self.start(
            name, sys.executable, "-c", "from autofed.cli import main; main()", "site", str(plan), str(work),
            "--name", name, "-o", str(memory), "--superlink", f"{LOCALHOST}:{self.port}", "--key", str(key),
            "--ca", str(self.root / "ca.crt"), "--device", "cpu",
        )  # fmt: skip

    def node(self, name: str, key: Path, config: dict[str, str]) -> None:
        """Start a SuperNode; it reaches only the SuperLink."""
        words = " ".join(f'{word}="{value}"' for word, value in config.items())
        self.start(name, "flower-supernode", "--root-certificates", str(self.root / "ca.crt"),
                   "--superlink", f"{LOCALHOST}:{self.port}", "--auth-supernode-private-key", str(key),
                   "--host", LOCALHOST, "--port", str(free_port()), "--node-config", words)  # fmt: skip

    def run(self, *command: str, seconds: float = 280.0) -> subprocess.CompletedProcess:
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=seconds, check=False)

    def autofed(self, *words: str) -> subprocess.CompletedProcess:
        return self.run(sys.executable, "-c", "from autofed.cli import main; main()", *words)

    def _answers(self, port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((LOCALHOST, port)) == 0


def write_certificates(folder: Path) -> None:
    """ca.crt, and server.crt and server.key for this machine."""
    authority, server = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = _certificate("autofed test", authority.public_key(), "autofed test", authority, is_authority=True)
    leaf = _certificate("localhost", server.public_key(), "autofed test", authority, is_authority=False)
    for name, found in (("ca.crt", root), ("server.crt", leaf)):
        (folder / name).write_bytes(found.public_bytes(serialization.Encoding.PEM))
    (folder / "server.key").write_bytes(server.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ))  # fmt: skip


def _certificate(name, public, issuer, signer, *, is_authority):
    now = datetime.datetime.now(datetime.UTC)
    addresses = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(LOCALHOST))]
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        .sign(signer, hashes.SHA256())
    )

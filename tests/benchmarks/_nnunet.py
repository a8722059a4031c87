"""What the benchmarks beside nnU-Net share: the pooled data, nnU-Net's environment, and the cost of a program."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

SAMPLES_PER_SECOND = 20
SHARE_OF_LOOKING = 0.05
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "nnUNet_n_proc_DA", "nnUNet_def_n_proc", "nnUNet_compile")


def pool_sites(sites: Sequence[Path], raw: Path, images_to_predict: Path | None = None) -> int:
    """Copy the cases of all sites into one dataset, each named with its site; gives how many there are.

    JPEG pictures become PNG, since nnU-Net refuses them: the same pixels.
    """
    if not (raw / "dataset.json").is_file():
        shutil.rmtree(raw, ignore_errors=True)
        for site in sites:
            for kind in ("imagesTr", "labelsTr"):
                _copy(site.glob(f"{kind}/*"), raw / kind, f"{site.name}_")
        if images_to_predict:
            _copy(images_to_predict.iterdir(), raw / "imagesTs", "")
        description = json.loads((sites[0] / "dataset.json").read_text())
        description.pop("patients", None)
        description["numTraining"] = len(list((raw / "labelsTr").iterdir()))
        if description["file_ending"] in (".jpg", ".jpeg"):
            description["file_ending"] = ".png"
        (raw / "dataset.json").write_text(json.dumps(description))  # last: it says that all is there
    return len(list((raw / "labelsTr").iterdir()))


def _copy(sources: Iterable[Path], folder: Path, prefix: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        target = folder / (prefix + source.name)
        if source.suffix in (".jpg", ".jpeg"):
            Image.open(source).save(target.with_suffix(".png"))
        else:
            shutil.copyfile(source, target)


def environment(raw: Path, preprocessed: Path, results: Path, threads: int | None = 1) -> dict[str, str]:
    """Where nnU-Net finds and leaves its data, and the threads of each process of both programs.

    Without a number of threads both choose, and what the user set about that is taken out.
    """
    kept = {k: v for k, v in os.environ.items() if threads or k not in (*THREADS, *WAITING)}
    return {**kept, **(dict.fromkeys(THREADS, str(threads)) if threads else {}), "nnUNet_raw": str(raw),
            "nnUNet_preprocessed": str(preprocessed), "nnUNet_results": str(results)}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What a tree of processes took: wall and processor seconds, and its highest memory in MB.

    `pss_mb` counts a page that several processes share once, `rss_mb` in each of them.
    """

    seconds: float
    cpu_seconds: float
    pss_mb: float
    rss_mb: float


def measure_trees(commands: Sequence[Sequence[str]], environ: Mapping[str, str], log: Path) -> Cost:
    """Run commands one after the other, with all the processes that they start; an error ends it.

    The sum of RSS is read 20 times a second. PSS takes the system longer to count: it is read whenever that sum is at a
    new height, and else only as often as it takes a twentieth of a processor.
    """
    watch = _Watch()
    wall, cpu = time.monotonic(), 0.0
    with open(log, "w") as output:
        for command in commands:
            process = subprocess.Popen(command, env=environ, stdout=output, stderr=output, start_new_session=True)
            while True:
                done, status, usage = os.wait4(process.pid, os.WNOHANG)
                if done:
                    break
                watch.look(process.pid)
                time.sleep(1 / SAMPLES_PER_SECOND)
            process.returncode = os.waitstatus_to_exitcode(status)
            cpu += usage.ru_utime + usage.ru_stime
            if process.returncode:
                raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    return Cost(time.monotonic() - wall, cpu, watch.pss / 1024, watch.rss / 1024)


def run(command: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
    """Run a command and keep what it says; an error ends it."""
    with open(log, "w") as output:
        done = subprocess.run(command, env=environ, stdout=output, stderr=output, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")


class _Watch:
    """The highest memory of a session so far, in kB."""

    def __init__(self) -> None:
        self.rss = self.pss = 0.0
        self.rest_until = 0.0

    def look(self, session: int) -> None:
        """Count what the session's processes hold now."""
        members = _session(session)
        rss = sum(_kilobytes(pid, "status", "VmRSS:") for pid in members)
        begin = time.monotonic()
        if rss > self.rss or (rss > self.pss and begin > self.rest_until):
            self.pss = max(self.pss, sum(_kilobytes(pid, "smaps_rollup", "Pss:") for pid in members))
            end = time.monotonic()
            self.rest_until = end + (end - begin) / SHARE_OF_LOOKING
        self.rss = max(self.rss, rss)


def _session(session: int) -> list[str]:
    """The processes that a command started, also those whose parent is gone."""
    members = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended just now
                continue
            if int(fields[3]) == session:
                members.append(entry.name)
    return members


def _kilobytes(pid: str, file: str, key: str) -> int:
    try:
        lines = Path("/proc", pid, file).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def reached(is_reached: bool) -> str:
    return "reached" if is_reached else "NOT reached"

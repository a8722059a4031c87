"""The metrics of each round: a line of JSON for programs, and the same curves for TensorBoard."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from autofed.files import write_bytes
from autofed.messages import Arrays

_RECENT = 10
"""So many rounds tell how long another one takes."""

SiteMetrics = Mapping[str, Mapping[str, Any]]
"""By site: its mean loss, and its Dice by structure where patients are held out."""


class TrafficMeter:
    """The `traffic` of a round in bytes: "down" to each site and "up" from it."""

    def __init__(self) -> None:
        self.traffic: dict[str, Counter[str]] = {"down": Counter(), "up": Counter()}

    def count(self, requests: Mapping[str, bytes], replies: Mapping[str, bytes]) -> None:
        """Add the bytes of requests and of what came back, by site."""
        for direction, messages in (("down", requests), ("up", replies)):
            self.traffic[direction].update({site: len(data) for site, data in messages.items()})


def append_line(folder: Path, line: Mapping[str, Any]) -> None:
    """Append the metrics of a round: `seconds`, those of the `sites`, and the `bytes` that its training sent.

    `left_out` says of the sites that did not count in it why they did not, if there are any, and `notes` are numbers
    that the algorithm left.
    """
    lines = [*read(folder), line]
    write_bytes(_path(folder), "".join(json.dumps(line) + "\n" for line in lines).encode())


def last_round(folder: Path) -> int:
    """The last round that has a line; 0 if none has."""
    return max((line["round"] for line in read(folder)), default=0)


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of all finished rounds, in order."""
    if not _path(folder).is_file():
        return []
    return [json.loads(line) for line in _path(folder).read_text(encoding="utf-8").splitlines()]


def in_words(folder: Path, rounds: int) -> str:
    """The metrics of the last round of so many, for people: loss, Dice if there is any, and the time that is left."""
    lines = read(folder)
    last = lines[-1]
    values = {"loss": loss(last), "Dice of held-out patients": scores(folder).get(last["round"])}
    parts = [f"{name} {value:.4f}" for name, value in values.items() if value is not None]
    recent = [line["seconds"] for line in lines[-_RECENT:]]
    left = (rounds - last["round"]) * sum(recent) / len(recent)
    parts += [f"{last['seconds']:.1f} s", f"about {duration(left)} left" if left else "the last"]
    return f"round {last['round']} of {rounds}: {', '.join(parts)}"


def loss(line: Mapping[str, Any]) -> float | None:
    """The mean training loss of the sites in a round; None where sites do not report it, as in a private training."""
    losses = [site["loss"] for site in line["sites"].values() if site.get("loss") is not None]
    return float(np.mean(losses)) if losses else None


def duration(seconds: float) -> str:
    """In the unit that people would take."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.0f} s"


def scores(folder: Path) -> dict[int, float]:
    """The score of each round that has one: the mean over sites of their mean Dice over structures."""
    by_round = {}
    for line in read(folder):
        dice = [np.mean(list(site["dice"].values())) for site in line["sites"].values() if "dice" in site]
        if dice:
            by_round[line["round"]] = float(np.mean(dice))
    return by_round


def means(arrays: Arrays) -> dict[str, float]:
    """The mean of each array that holds a number."""
    return {name: float(np.mean(values)) for name, values in arrays.items() if values.size}


def with_notes(line: Mapping[str, Any], notes: Arrays) -> dict[str, Any]:
    """The line with numbers that an algorithm left: "name/site" among that site's metrics, others under `notes`."""
    values = {name: round(value, 6) for name, value in means(notes).items()}
    sites = {site: dict(site_metrics) for site, site_metrics in line["sites"].items()}
    for name, value in values.items():
        what, _, site = name.partition("/")
        if site:
            sites.setdefault(site, {})[what] = value
    general = {name: value for name, value in values.items() if "/" not in name}
    return {**line, "sites": sites, **({"notes": general} if general else {})}


def _path(folder: Path) -> Path:
    return Path(folder) / "metrics.jsonl"


class MetricsBoard:
    """The curves as events that TensorBoard reads, in folder/tensorboard; to be used in a `with` statement.

    The file is written anew from the lines of the finished rounds, so that it says no more and no less than they do.
    Written in the calling thread, so that an error of the disk is raised here.
    """

    def __init__(self, folder: Path):
        from tensorboardX.event_file_writer import EventsWriter

        place = Path(folder) / "tensorboard"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        self._writer = EventsWriter(str(place / "events"))
        for line in read(folder):
            self.show(line["round"], line["seconds"], line["sites"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def show(self, round: int, seconds: float, sites: SiteMetrics) -> None:
        """Add the points of a round."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for tag, value in (("seconds", seconds), *_curves(sites)):
            self._writer.write_event(Event(wall_time=time.time(), step=round, summary=scalar(tag, value)))
        self._writer.flush()


def _curves(sites: SiteMetrics) -> Iterator[tuple[str, float]]:
    for site, site_metrics in sites.items():
        for name, value in site_metrics.items():
            if isinstance(value, Mapping):
                yield from ((f"{name}/{site}/{part}", number) for part, number in value.items())
            else:
                yield f"{name}/{site}", value

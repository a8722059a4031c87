"""The coordinator's end: which node is which site, requests to them and their responses."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping
from logging import INFO
from typing import Any

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.common import log
from flwr.serverapp import Grid, ServerApp

from autofed import __version__, algorithms
from autofed.errors import raise_if_any
from autofed.federation.node import Handshake
from autofed.federation.transports.flower.records import Words, packed, unpacked
from autofed.plans import Plan

PATIENCE_SECONDS = 90.0
"""So long the coordinator waits at the start for sites to appear. One that was killed is let in again after 60 s."""

NUDGE_SECONDS = 30.0
"""After so long without an answer a node gets a small message besides.

A SuperNode of Flower 1.41 whose run was stopped while it fetched a message hands on each later reply only when the next
message comes: without this the coordinator would wait for a reply that lies there.
"""

_POLL_SECONDS = 0.5
_LONGEST_SECONDS = 30 * 24 * 3600.0
"""How long Flower keeps a message if the plan sets no deadline; its own 12 hours are less than a round may be."""

Coordinate = Callable[[Mapping[str, Any], Callable[[Plan, str], "OverFlower"], Callable[[str], None]], None]
"""Coordinates a run, given its configuration, a transport to the sites of a plan, and where messages to the user go."""


def serve(coordinate: Coordinate) -> ServerApp:
    """The app that a SuperLink runs: `coordinate`, with Flower's grid to reach the sites."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        say = lambda text: log(INFO, "%s", text)  # noqa: E731
        coordinate(context.run_config, lambda plan, run: OverFlower(grid, plan, run, say=say), say)

    return app


class OverFlower:
    """Hands each site its request and collects its answer; who has not answered by the plan's deadline is not in it.

    `run` is what requests call the training. A node is the site that its handshake names; if it was registered under a
    name, only that one.
    """

    def __init__(
        self,
        grid: Grid,
        plan: Plan,
        run: str,
        *,
        patience_seconds: float = PATIENCE_SECONDS,
        nudge_seconds: float = NUDGE_SECONDS,
        say: Callable[[str], None] = lambda _: None,
    ):
        """A transport to the sites that have registered as nodes.

        Args:
            grid: Flower's connection to the nodes.
            plan: The plan that the sites have to have, too.
            run: The name of the training in requests.
            patience_seconds: How long to wait for sites to come before the first round.
            nudge_seconds: How long between two words about who is missing.
            say: Is called with a sentence about what is going on.
        """
        self.grid = grid
        self.plan = plan
        self.run = run
        self.patience_seconds = patience_seconds
        self.nudge_seconds = nudge_seconds
        self.say = say
        self.nodes: dict[str, int] = {}
        self._handshakes: dict[int, Handshake] = {}
        self._contacted: dict[str, int] = {}
        self._contact_times: dict[int, float] = {}
        minutes = plan.agreement.faults.deadline_minutes
        self.deadline_seconds = minutes * 60 if minutes else None

    def meet(self, least: int | None = None, *, holding_out: bool = False) -> None:
        """Find every site of the plan, or at `least` so many after waiting for all.

        `Problems` names the sites that are missing, come twice, or have another plan, and if nobody is `holding_out`.
        """
        begin = time.monotonic()
        problems = self._find_new_nodes()
        while self._is_worth_waiting(time.monotonic() - begin, refused=bool(problems)):
            time.sleep(_POLL_SECONDS)
            problems += self._find_new_nodes()
        if least is None or len(self.nodes) < least:
            problems += self._missing()
        if not problems and holding_out and not any(handshake.holds_out for handshake in self._handshakes.values()):
            problems.append("no site holds out a patient in this fold; write --fold all")
        raise_if_any("the sites", problems)
        for problem in self._missing():
            self.say(problem)

    def __call__(self, requests: Mapping[str, bytes]) -> dict[str, bytes]:
        """The answers, by site."""
        for problem in self._find_new_nodes():
            self.say(problem)
        words = {"agreement": self.plan.agreement.digest()}
        contents = {self.nodes[site]: packed(words, data) for site, data in requests.items() if site in self.nodes}
        sites = {node: site for site, node in self.nodes.items()}
        return {sites[node]: data for node, (_, data) in self._exchange(contents, self.deadline_seconds).items()}

    def _is_worth_waiting(self, seconds: float, refused: bool) -> bool:
        """Whether a site may still come, or, for a shorter while, a node with a reason against the training."""
        if self._missing() and not refused:
            return seconds < self.patience_seconds
        silent = set(self._contacted.values()) - set(self._handshakes)
        return bool(silent) and seconds < self.nudge_seconds

    def _find_new_nodes(self) -> list[str]:
        """Ask new nodes for their handshakes; the reasons against them.

        A node that is busy answers later, and takes part from then on.
        """
        here, now = {info.node_id: info.name for info in self.grid.get_nodes()}, time.monotonic()
        self._handshakes = {
            node: handshake
            for node, handshake in self._handshakes.items()
            if node in here or node in self.nodes.values()
        }
        new = [
            n for n in here if n not in self._handshakes and now >= self._contact_times.get(n, now) + self.nudge_seconds
        ]
        new += [n for n in here if n not in self._handshakes and n not in self._contact_times]
        self._contact_times |= dict.fromkeys(new, now)
        self._contacted |= self._push(dict.fromkeys(new, packed({"run": self.run})), _LONGEST_SECONDS)
        problems = []
        for node, (words, _) in sorted(self._pull(self._contacted).items()):
            if node in here and node not in self._handshakes:
                problems += self._receive_handshake(node, words.get("introduction", ""), here)
        return problems

    def _receive_handshake(self, node: int, handshake: str, here: Mapping[int, str]) -> list[str]:
        """Register a node as the site that it claims to be, or say why not; a refused one is asked again later."""
        try:
            fields = json.loads(handshake)
            if fields.get("version") != __version__:  # first: another version may have other fields
                found = f"{fields.get('site')} has autofed {fields.get('version')}, the coordinator {__version__}"
                return [f"{found}; install the same"]
            self._handshakes[node] = Handshake.model_validate(fields)
        except (ValueError, AttributeError):
            return [f"the node {node} cannot read its --node-config; its own terminal says why"]
        problems = self._admit(node, here[node], here)
        if problems:
            del self._handshakes[node]
        return problems

    def _admit(self, node: int, registered: str, here: Collection[int]) -> list[str]:
        handshake = self._handshakes[node]
        if registered and registered != handshake.site:
            return [f"the node registered as {registered} calls itself {handshake.site}; correct its --name"]
        if handshake.site not in self.plan.agreement.patients:
            self.say(f"a node calls itself {handshake.site}, which is no site of the plan; it takes no part")
            return []
        if handshake.site in self.nodes and self.nodes[handshake.site] in here:
            return [
                f"two nodes call themselves {handshake.site}: {self.nodes[handshake.site]} and {node}; stop one of them"
            ]
        problems = _plan_mismatches(handshake, self.plan)
        if not problems:
            self.nodes[handshake.site] = node
        return problems

    def _missing(self) -> list[str]:
        sites = self.plan.agreement.patients
        others = sorted({handshake.site for handshake in self._handshakes.values()} - set(sites))
        found = f" (there is {', '.join(others)})" if others else ""
        return [
            f"no node takes part as {site}{found}; start `autofed site --name {site}` there"
            for site in sites if site not in self.nodes
        ]  # fmt: skip

    def _exchange(self, contents: Mapping[int, RecordDict], seconds: float | None) -> dict[int, tuple[Words, bytes]]:
        """One message to each node, and the replies that come in time."""
        waiting = self._push(contents, seconds or _LONGEST_SECONDS)
        begin = time.monotonic()
        end, nudge = begin + (seconds or _LONGEST_SECONDS), begin + self.nudge_seconds
        replies = self._pull(waiting)
        while waiting and time.monotonic() < end:
            if time.monotonic() >= nudge:
                self._push(dict.fromkeys(waiting.values(), packed({"run": self.run})), self.nudge_seconds)
                nudge += self.nudge_seconds
            time.sleep(_POLL_SECONDS)
            replies |= self._pull(waiting)
        return replies

    def _pull(self, waiting: dict[str, int]) -> dict[int, tuple[Words, bytes]]:
        """The replies that are there, by node; their messages are `waiting` no longer."""
        replies = {}
        for reply in self.grid.pull_messages(list(waiting)) if waiting else []:
            node = waiting.pop(reply.metadata.reply_to_message_id, None)
            if node is None:
                continue
            try:
                replies[node] = unpacked(reply.content)
            except (KeyError, ValueError):  # no content but an error, or a content that is none of ours
                reason = reply.error.reason if reply.has_error() else "it is none of autofed's"
                self.say(f"the node {node} gave no answer: {reason}")
        return replies

    def _push(self, contents: Mapping[int, RecordDict], seconds: float) -> dict[str, int]:
        """Send a message to each node, which Flower forgets after so long; the nodes by the names of the messages."""
        messages = [Message(content, node, MessageType.QUERY, ttl=seconds) for node, content in contents.items()]
        sent = self.grid.push_messages(messages) if messages else []
        return {message: node for message, node in zip(sent, contents, strict=False) if message}


def _plan_mismatches(handshake: Handshake, plan: Plan) -> list[str]:
    """Why a site cannot train by the coordinator's plan."""
    if not handshake.agreement:
        return [f"{handshake.site} cannot take part; why is in its own site.log and on the terminal of its SuperNode"]
    problems = []
    free = algorithms.find(plan.agreement.algorithm.name).shares_pseudo_labels  # to have networks of their own
    for name, theirs, ours in (
        ("agreement", handshake.agreement, plan.agreement.digest()),
        ("local part", handshake.local, plan.local.digest()),
    ):
        if theirs != ours and not (free and name == "local part"):
            found = (
                f"{handshake.site} has agreed to a plan with another {name} ({theirs[:12]}, the run's is {ours[:12]})"
            )
            problems.append(f"{found}; hand it the plan.json inside the run, to be read and put where its plan is")
    return problems

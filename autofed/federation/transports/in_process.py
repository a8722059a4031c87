"""The embedded transport: each site in turn, in this process, with no server and no sockets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from autofed.federation.site import Site


class InProcess:
    """Hands each site its request as bytes and collects its answer as bytes."""

    def __init__(self, sites: Iterable[Site]):
        self.sites = {site.name: site for site in sites}

    def __call__(self, requests: Mapping[str, bytes]) -> dict[str, bytes]:
        """The answers, by site."""
        return {name: self.sites[name].answer(request) for name, request in requests.items()}

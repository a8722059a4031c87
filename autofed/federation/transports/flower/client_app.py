"""A site's replies to Flower's messages."""

from __future__ import annotations

from collections.abc import Mapping
from logging import WARNING
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import log

from autofed.errors import ValidationErrors
from autofed.federation.node import SiteNode
from autofed.federation.transports.flower.records import packed, unpacked

client_app = ClientApp()


@client_app.query()
def _answer(message: Message, context: Context) -> Message:
    """The one handler. An exception's text would travel to the coordinator, so there is none."""
    return Message(answer(message.content, context.node_config), reply_to=message)


def answer(content: RecordDict, node_config: Mapping[str, Any]) -> RecordDict:
    """A site's reply: to a request the bytes of its response, to anything else its handshake."""
    try:
        site_node = SiteNode.parse(dict(node_config), "--node-config")
    except ValidationErrors as error:
        log(WARNING, "%s", error)
        return packed({})
    words, data = unpacked(content)
    if data:
        return packed({}, site_node.answer(data, words.get("agreement", "")))
    return packed({"introduction": site_node.handshake(words.get("run", "")).model_dump_json()})

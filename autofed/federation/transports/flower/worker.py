"""A site's one process for all messages, in place of one that Flower would start for each.

Flower's own would run the code that came with the run; this one runs what is installed here and nothing else. It speaks
Flower 1.41's way of handing tasks to processes, which has no public name: `flwr` is pinned for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from logging import ERROR
from typing import Any

import httpx
from flwr.app import Message
from flwr.common import log
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from autofed.federation.transports.flower.client_app import answer

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_POLL_SECONDS = 0.3
_PUSH_SECONDS = 60.0
"""So long a finished answer waits for a SuperNode that is away; the site has stored it and gives it again."""


def work(address: str, secret: bytes, config: Mapping[str, Any], running: Callable[[], bool]) -> None:
    """Answer whatever the SuperNode at this address of this machine receives, while it is `running`."""
    client = _client(
        address, SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({_ACQUIRE}))
    )
    try:
        while running():
            token = _next_task(client)
            if token:
                _do(address, token, config)
            else:
                time.sleep(_POLL_SECONDS)
    finally:
        client.close()


def _next_task(client: RuntimeHttpClient) -> str:
    """The token of a message that waits for its answer; nothing if there is none, or no SuperNode yet."""
    try:
        reply = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
    except httpx.HTTPError:
        return ""
    return reply.token if reply.HasField("task") else ""


def _do(address: str, token: str, config: Mapping[str, Any]) -> None:
    """Fetch a message, answer it, and send the answer off, as `flwr-clientapp` would."""
    client = _client(address, RuntimeTokenHttpInterceptor(token), seconds=_PUSH_SECONDS)
    beats = HeartbeatSender(make_task_heartbeat_fn_http(client))
    beats.start()
    try:
        message, context, _, _ = pull_task_input(client)
        push_message(client, Message(answer(message.content, config), reply_to=message), context)
        push_task_output(client, context, SubStatus.COMPLETED, "")
    except Exception as error:
        log(ERROR, "a message was not answered", exc_info=error)
    finally:
        beats.stop()
        client.close()


def _client(address: str, interceptor: Any, seconds: float = 0.0) -> RuntimeHttpClient:
    """A connection to the SuperNode; what fails is tried again for so long."""
    retry = make_simple_http_retry_invoker()
    retry.max_time = seconds
    return RuntimeHttpClient.from_server_address(
        server_address=address, insecure=True, root_certificates=None, retry_invoker=retry,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), interceptor],
    )  # fmt: skip

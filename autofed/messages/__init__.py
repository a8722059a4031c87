"""What travels between sites and the coordinator, and its bytes; in fewer bytes where the plan says so."""

from autofed.messages.messages import (
    ArrayGroups,
    Arrays,
    Failure,
    Message,
    Request,
    Response,
    ServerState,
    from_bytes,
    load_groups,
    pack,
    read_header,
    save_groups,
    to_bytes,
    unpack,
)

__all__ = [
    "ArrayGroups",
    "Arrays",
    "Failure",
    "Message",
    "Request",
    "Response",
    "ServerState",
    "from_bytes",
    "load_groups",
    "pack",
    "read_header",
    "save_groups",
    "to_bytes",
    "unpack",
]

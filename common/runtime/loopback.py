"""Whether a run's processes can reach each other on this machine."""

from __future__ import annotations

import socket

ANSWER_SECONDS = 5.0


def why_no_loopback() -> str | None:
    """Return why a connection over loopback fails, else None: all would wait for minutes."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), ANSWER_SECONDS).close()
    except OSError as error:
        return (
            "no loopback interface, over which its stages talk: 127.0.0.1 cannot be reached "
            f"({error.strerror}); expected it to be up, as by `ip link set lo up`"
        )
    return None

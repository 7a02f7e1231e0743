"""Find a port for a server that starts later, a `TCPStore` of `torch.distributed` for example."""

import random
import socket

_BELOW_OUTGOING = range(20000, 32768)  # Linux takes the port of an outgoing connection from 32768 on


def free_port() -> int:
    """Return a port at which nobody listens on any address.

    One that the kernel chooses may belong to an outgoing connection before the server starts, which takes seconds
    under load.
    """
    while True:
        port = random.SystemRandom().choice(_BELOW_OUTGOING)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port

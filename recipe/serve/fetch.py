"""An image behind a URL: only from hosts that the server's owner named, never from an address of the inner network."""

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from recipe.serve.admission import Refusal

PORT = 443
_PART = 1 << 16


def fetch(url: str, allowed: Collection[str], max_bytes: int, seconds: float) -> bytes:
    """Return what is behind an https URL; redirects are not followed.

    Raises:
        Refusal: The host is not `allowed`, has an address that is not public, or gives no file within the limits.
    """
    host, target = _parts(url)
    if host not in allowed:
        remedy = "send the image itself" if not allowed else f"allowed are {', '.join(sorted(allowed))}"
        raise Refusal(403, f"images are not fetched from {host!r}: {remedy}")
    address = public_address(host)
    deadline = time.monotonic() + seconds
    connection = http.client.HTTPSConnection(host, timeout=seconds)
    try:
        # To the address that was judged: a second look-up of the name could give another.
        plain = socket.create_connection((address, PORT), timeout=seconds)
        connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
        connection.request("GET", target, headers={"Accept": "image/*"})
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise Refusal(400, f"{host} answered with status {response.status}: give a URL of an image itself")
        return _read(response, host, max_bytes, deadline)
    except (OSError, http.client.HTTPException) as error:
        raise Refusal(400, f"the image cannot be fetched from {host}: {error or type(error).__name__}") from error
    finally:
        connection.close()


def _parts(url: str) -> tuple[str, str]:
    """Return the host of a URL and what to ask it for."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if parts.scheme != "https" or not host or port not in (None, PORT) or parts.username or parts.password:
        raise Refusal(400, "url: give one that begins with https:// and a host, without a port or a user")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise Refusal(400, "url: quote what is not ASCII")
    return host, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def public_address(host: str) -> str:
    """Return an address of a host; raise Refusal if it has none, or any that is not public."""
    try:
        found = socket.getaddrinfo(host, PORT, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Refusal(400, f"{host} is not known") from error
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        known = ipaddress.ip_address(address)
        if not known.is_global or known.is_multicast:
            raise Refusal(403, f"{host} is in a network that is not public")
    return addresses[0]


def _read(response: http.client.HTTPResponse, host: str, max_bytes: int, deadline: float) -> bytes:
    data = bytearray()
    while part := response.read(_PART):
        data += part
        if len(data) > max_bytes:
            raise Refusal(413, f"the image of {host} has more than {max_bytes} bytes")
        if time.monotonic() > deadline:
            raise Refusal(408, f"{host} did not give the image in time")
    return bytes(data)

"""Fetches files from the hosts that the operator allows, and treats every address and every server as hostile.

An address is parsed once, by `ADDRESS`; what it does not match is refused, so no two parsers can understand it in two
ways. A host is resolved once for each hop, and the connection goes to an address of that answer. If any of them is not
a public address, the hop is refused: the same for redirects, of which each is checked like the first address. Size and
time are limited while the file arrives. Messages say nothing of what a server answered.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from urllib.parse import urljoin

from msd.errors import UserError

# scheme, host, port, path with query: printable ASCII without a backslash; no user, no IPv6 literal
ADDRESS = re.compile(
    r"(https?)://([a-z0-9](?:[a-z0-9.-]*[a-z0-9])?)(?::([0-9]{1,5}))?(?:([/?][!-\[\]-~]*))?", re.IGNORECASE
)
PORTS = {"http": 80, "https": 443}
REDIRECTS, HOPS = (301, 302, 303, 307, 308), 3
PIECE = 1 << 16  # bytes
# all public IPv6 addresses but those that contain an IPv4 address (6to4, Teredo) are in 2000::/3; mapped ones are not
PUBLIC, EMBEDDING = ipaddress.IPv6Network("2000::/3"), tuple(map(ipaddress.IPv6Network, ("2002::/16", "2001::/32")))


@dataclass(frozen=True)
class Place:
    """A parsed address. target: path and query."""

    scheme: str
    host: str
    port: int
    target: str

    @classmethod
    def parse(cls, address: str) -> Place | None:
        """The place of an address without its fragment; None if it is malformed."""
        found = ADDRESS.fullmatch(address.partition("#")[0])
        if found is None:
            return None
        scheme, host, port, target = found.groups()
        port = int(port) if port else PORTS[scheme.lower()]
        target = target or "/"
        return cls(scheme.lower(), host.lower(), port, target if target[0] == "/" else f"/{target}")

    @property
    def authority(self) -> str:
        """Host and port, without the scheme's own port."""
        return self.host if self.port == PORTS[self.scheme] else f"{self.host}:{self.port}"


class Remote:
    """Fetches from `hosts`: names, each with a port if it is not the scheme's own, such as "example.com:8443"."""

    def __init__(self, hosts: Iterable[str]) -> None:
        self.hosts = frozenset(host.lower() for host in hosts)
        for host in self.hosts:
            if Place.parse(f"https://{host}") is None or "/" in host or "?" in host:
                raise UserError(f"'{host}' is no name of a host; give one such as example.com or example.com:8443")
        self._tls = ssl.create_default_context()

    def fetch(self, address: str, name: str, most: int, until: float) -> bytes:
        """The file at an address. name: for messages. most: bytes. until: `time.monotonic`.

        UserError: the address or one that it redirects to is malformed or not allowed, or the file cannot be fetched.
        """
        for _ in range(1 + HOPS):
            place = Place.parse(address)
            if place is None:
                raise UserError(f"{name}: an address is malformed; send http(s)://HOST/PATH, or data:…;base64,…")
            if place.authority not in self.hosts:
                raise UserError(f"{name}: this server does not fetch from that host; send data:…;base64,…")
            file, location = self._get(place, name, most, until)
            if file is not None:
                return file
            address = urljoin(address, location)
        raise UserError(f"{name} has more than {HOPS} redirects; give its last address")

    def _get(self, place: Place, name: str, most: int, until: float) -> tuple[bytes | None, str]:
        """(the file, or None for a redirect; where the redirect goes)."""
        failed = UserError(f"{name} could not be fetched; check its address, or send data:…;base64,…")
        try:
            addresses = resolve(place.host, place.port)
        except (OSError, UnicodeError) as error:
            raise failed from error
        if not addresses or not all(map(public, addresses)):
            raise UserError(f"{name}: the address of its host is not public; send data:…;base64,…")
        try:
            with _connected(addresses, place.port, until) as plain:
                watch = threading.Timer(_left(until), _end, (plain,))
                watch.start()
                try:
                    return self._request(plain, place, name, most)
                finally:
                    watch.cancel()
                    if time.monotonic() >= until:  # what was read may have been cut
                        raise TimeoutError
        except (OSError, HTTPException, ValueError) as error:
            raise failed from error

    def _request(self, plain: socket.socket, place: Place, name: str, most: int) -> tuple[bytes | None, str]:
        """See `_get`. plain: connected to the place. OSError, HTTPException or ValueError if it cannot be fetched."""
        connection = HTTPConnection(place.host, place.port)
        connection.auto_open = 0  # it never connects by itself
        # a copy, so that the watch can end this connection although TLS takes its socket over
        own = plain.dup()
        own.settimeout(plain.gettimeout())
        connection.sock = self._tls.wrap_socket(own, server_hostname=place.host) if place.scheme == "https" else own
        try:
            headers = {"Host": place.authority, "Accept-Encoding": "identity", "Connection": "close"}
            connection.request("GET", place.target, headers={**headers, "User-Agent": "msd"})
            response = connection.getresponse()
            location = response.headers.get("Location")
            if response.status in REDIRECTS and location is not None:
                return None, location
            encoding = response.headers.get("Content-Encoding", "identity")
            if response.status != 200 or encoding.lower() != "identity":
                raise HTTPException(f"status {response.status}, encoding {encoding}")
            return _read(response, name, most), ""
        finally:
            connection.close()


def resolve(host: str, port: int) -> list[str]:
    """The IP addresses of a host. OSError if there are none."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def connect(address: str, port: int, seconds: float) -> socket.socket:
    """Connects to an IP address."""
    return socket.create_connection((address, port), timeout=seconds)


def _connected(addresses: list[str], port: int, until: float) -> socket.socket:
    """A connection to the first of the addresses that takes it. OSError if none does."""
    for address in addresses[:-1]:
        with suppress(OSError):
            return connect(address, port, _left(until) / 2)
    return connect(addresses[-1], port, _left(until))


def _end(plain: socket.socket) -> None:
    """Ends a connection that another thread reads."""
    with suppress(OSError):
        plain.shutdown(socket.SHUT_RDWR)


def public(address: str) -> bool:
    """Whether an IP address is reached over the internet, and contains no other address."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address) and (parsed not in PUBLIC or any(parsed in net for net in EMBEDDING)):
        return False
    return parsed.is_global and not parsed.is_multicast


def _left(until: float) -> float:
    """The seconds until then; TimeoutError if it is past."""
    seconds = until - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _read(response: HTTPResponse, name: str, most: int) -> bytes:
    """The body, counted as it arrives. UserError if it is larger than `most` bytes."""
    too_large = UserError(f"{name} is larger than this server fetches; compress or resize it")
    if (response.length or 0) > most:
        raise too_large
    pieces, size = list[bytes](), 0
    while piece := response.read1(PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise too_large
    if response.length:
        raise HTTPException("the body is shorter than its length")
    return b"".join(pieces)

"""HTTP connections to public addresses only: each goes to the very address that was checked."""

import socket
import ssl
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any
from urllib.request import BaseHandler, HTTPHandler, HTTPSHandler, ProxyHandler, Request

from fastav.errors import UnreadableMedia, reason_of

TRANSLATED = (ip_network("64:ff9b::/96"), ip_network("64:ff9b:1::/48"))
"""Networks of NAT64, whose addresses stand for IPv4 addresses."""


def public_handlers() -> tuple[BaseHandler, ...]:
    """What opens URLs over such connections, without the proxies of the environment."""
    return ProxyHandler({}), _PublicHTTP(), _PublicHTTPS()


def host_name(host: str) -> str:
    """A host's name as it is looked up: in lower case and ASCII, without the dot at its end.

    Raises: UnreadableMedia if it is no name.
    """
    if ":" in host:  # an IPv6 address
        return host.lower()
    try:
        return host.rstrip(".").encode("idna").decode().lower()
    except UnicodeError as error:
        raise UnreadableMedia(f"{host} is not the name of a host: {reason_of(error)}", "check the address") from None


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet; those that stand for an IPv4 address are not."""
    ip = ip_address(address.partition("%")[0])
    if isinstance(ip, IPv6Address) and (
        ip.ipv4_mapped or ip.sixtofour or ip.teredo or ip.is_site_local or any(ip in net for net in TRANSLATED)
    ):
        return False
    special = ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback or ip.is_link_local
    return ip.is_global and not special


def connect(host: str, port: int, timeout: float | None) -> socket.socket:
    """A connection to a host, all of whose addresses are public; the name is looked up once.

    Raises: UnreadableMedia if one of them is not; OSError.
    """
    found = socket.getaddrinfo(host_name(host), port, type=socket.SOCK_STREAM)
    if not all(is_public(str(address[0])) for *_, address in found):
        raise UnreadableMedia(f"{host} is not loaded: it is not on the public internet", "send the content of the clip")
    failure: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in found:
        connection = socket.socket(family, kind, protocol)
        connection.settimeout(timeout)
        try:
            connection.connect(address)
        except OSError as error:
            connection.close()
            failure = error
        else:
            return connection
    raise failure


class _PublicConnection(HTTPConnection):
    def connect(self) -> None:
        self.sock = connect(self.host, self.port, self.timeout)


class _PublicTLSConnection(HTTPSConnection):
    def connect(self) -> None:
        raw = connect(self.host, self.port, self.timeout)
        try:
            self.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host_name(self.host))
        except BaseException:
            raw.close()
            raise


class _PublicHTTP(HTTPHandler):
    def http_open(self, req: Request) -> HTTPResponse:
        return self.do_open(_opener(_PublicConnection), req)


class _PublicHTTPS(HTTPSHandler):
    def https_open(self, req: Request) -> HTTPResponse:
        return self.do_open(_opener(_PublicTLSConnection), req)


def _opener(kind: Any) -> Any:
    """The class of connections, as urllib wants it."""
    return kind

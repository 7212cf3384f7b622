"""A policy for public hosts only reaches no address of this machine or its network, however a URL names it.

Nothing here leaves this machine: names are looked up in a table, and servers listen on loopback.
"""

import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from fastav.errors import UnreadableMedia
from fastav.media import Clip, MediaPolicy, _public
from fastav.media.policy import fetch

REAL_LOOKUP = socket.getaddrinfo


class Handler(BaseHTTPRequestHandler):
    """Serves a text, redirects, and keeps the hosts that were asked for."""

    server: "Server"

    def do_GET(self) -> None:
        self.server.asked.append((self.headers["Host"], self.path))
        target = self.server.redirects.get(self.path)
        self.send_response(200 if target is None else 302)
        if target is not None:
            self.send_header("Location", target)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, format: str, *args: Any) -> None:
        return


class Server(ThreadingHTTPServer):
    """asked: the hosts and paths of requests. redirects: by path."""

    asked: list[tuple[str, str]]
    redirects: dict[str, str]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.asked, server.redirects = [], {}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Look names up in a table: each name has a list of answers, one for each lookup. Returns the names looked up."""
    monkeypatch.setattr(socket.socket, "connect", _on_loopback_only(socket.socket.connect))

    def install(**table: list[str]) -> list[str]:
        names: list[str] = []

        def lookup(host: Any, port: Any, *args: Any, **options: Any) -> Any:
            name = host.decode() if isinstance(host, bytes) else str(host)
            names.append(name)
            if (answers := table.get(name.replace(".", "_").replace("-", "_"))) is None:
                return REAL_LOOKUP(host, port, *args, **{**options, "flags": socket.AI_NUMERICHOST})
            address = answers.pop(0) if len(answers) > 1 else answers[0]
            return REAL_LOOKUP(address, port, *args, **options)

        monkeypatch.setattr(socket, "getaddrinfo", lookup)
        return names

    return install


def _on_loopback_only(connect: Any) -> Any:
    def checked(self: socket.socket, address: Any) -> None:
        assert address[0] in ("127.0.0.1", "::1"), f"this test would have reached {address}"
        connect(self, address)

    return checked


def _policy(server: Server | None = None, **options: Any) -> MediaPolicy:
    ports = None if server is None else frozenset({server.server_port})
    return MediaPolicy(files=False, public_only=True, max_seconds=10.0, ports=ports, **options)


@pytest.fixture
def loopback_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.1 stands for a public address."""
    real = _public.is_public
    monkeypatch.setattr(_public, "is_public", lambda address: address == "127.0.0.1" or real(address))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.255.255.254", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254",
        "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "240.0.0.1",
        "255.255.255.255", "::", "::1", "::127.0.0.1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12:3456::1", "fec0::1",
        "ff02::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1",
        "2002:7f00:1::1", "2002:808:808::1", "2001:0:808:808::1", "2001:db8::1", "100::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not _public.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "1.1.1.1", "2606:4700::1111", "2a00:1450:4001::1"])
def test_addresses_that_are_public(address: str) -> None:
    assert _public.is_public(address)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.1", "0x7f.1", "0x7f000001", "2130706433", "017700000001", "0177.0.0.1", "127.0.0.1.", "0",
        "[::1]", "[::ffff:127.0.0.1]", "[0:0:0:0:0:ffff:7f00:1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::1]",
        "[fe80::1]",
        "169.254.169.254", "0xa9fea9fe", "\uff11\uff12\uff17.\uff10.0.1", "127\u30020\u30020\u30021",
        "localhost", "LOCALHOST.", "metadata.internal",
        "two.example",
    ],
)  # fmt: skip
def test_no_spelling_reaches_this_machine(host: str, server: Server, lookups: Any) -> None:
    lookups(
        localhost=["127.0.0.1"], metadata_internal=["169.254.169.254"], two_example=["::1"], LOCALHOST=["127.0.0.1"]
    )
    with pytest.raises(UnreadableMedia, match=r"not on the public internet|cannot be loaded"):
        fetch(f"http://{host}:{server.server_port}/a", _policy(server))
    assert not server.asked


def test_one_private_address_among_several_is_enough(
    server: Server, monkeypatch: pytest.MonkeyPatch, loopback_is_public: None
) -> None:
    def lookup(host: str, port: int, **options: Any) -> Any:
        return [*REAL_LOOKUP("127.0.0.1", port, **options), *REAL_LOOKUP("127.0.0.2", port, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with pytest.raises(UnreadableMedia, match="not on the public internet"):
        fetch(f"http://two.example:{server.server_port}/a", _policy(server))
    assert not server.asked


def test_a_name_is_looked_up_once_and_keeps_its_name(server: Server, lookups: Any, loopback_is_public: None) -> None:
    names = lookups(clips_example=["127.0.0.1", "10.0.0.1"])
    port = server.server_port
    assert fetch(f"http://Clips.Example.:{port}/a?key=1", _policy(server)) == b"hello"
    assert names == ["clips.example"]
    assert server.asked == [(f"Clips.Example.:{port}", "/a?key=1")]
    with pytest.raises(UnreadableMedia, match="not on the public internet"):
        fetch(f"http://clips.example:{port}/a", _policy(server))


@pytest.mark.parametrize(
    "target",
    ["http://127.0.0.2:{port}/b", "http://[::1]:{port}/b", "//127.0.0.2:{port}/b", "http://inner.example:{port}/b"],
)
def test_a_redirect_to_this_machine_is_not_followed(
    target: str, server: Server, lookups: Any, loopback_is_public: None
) -> None:
    lookups(clips_example=["127.0.0.1"], inner_example=["10.1.2.3"])
    server.redirects["/a"] = target.format(port=server.server_port)
    with pytest.raises(UnreadableMedia, match="not on the public internet"):
        fetch(f"http://clips.example:{server.server_port}/a", _policy(server))
    assert [path for _, path in server.asked] == ["/a"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("file:///etc/passwd", "is not allowed"),
        ("ftp://clips.example/a", "not an http address"),
        ("gopher://clips.example/a", "is not allowed"),
        ("data:text/plain,x", "is not allowed"),
        ("http://clips.example:22/a", "22 is not an allowed port"),
        ("http://user:secret@clips.example/a", "a user or a password"),
        ("http://other.example:{port}/a", "not an allowed host"),
    ],
)
def test_redirects_are_checked_as_urls_are(
    target: str, message: str, server: Server, lookups: Any, loopback_is_public: None
) -> None:
    lookups(clips_example=["127.0.0.1"], other_example=["127.0.0.1"])
    server.redirects["/a"] = target.format(port=server.server_port)
    with pytest.raises(UnreadableMedia, match=message) as caught:
        fetch(f"http://clips.example:{server.server_port}/a", _policy(server, hosts=frozenset({"clips.example"})))
    assert "secret" not in str(caught.value)
    assert [path for _, path in server.asked] == ["/a"]


def test_at_most_five_redirects_are_followed(server: Server, lookups: Any, loopback_is_public: None) -> None:
    names = lookups(clips_example=["127.0.0.1"])
    server.redirects |= {f"/{n}": f"/{n + 1}" for n in range(9)}
    with pytest.raises(UnreadableMedia, match="too many redirects"):
        fetch(f"http://clips.example:{server.server_port}/0", _policy(server))
    assert [path for _, path in server.asked] == [f"/{n}" for n in range(6)]
    assert len(names) == 6  # every connection is checked
    assert fetch(f"http://clips.example:{server.server_port}/4", _policy(server)) == b"hello"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://clips.example:8080/a", "8080 is not an allowed port"),
        ("https://clips.example:22/a", "22 is not an allowed port"),
        ("http://user@clips.example/a", "a user or a password"),
        ("http://user:secret@clips.example/a", "a user or a password"),
        ("http://clips.example%3A8080/a", "is no host"),
        ("http://%31%32%37.0.0.1/a", "is no host"),
        ("http://clips..example/a", "not the name of a host|cannot be loaded"),
        ("ftp://clips.example/a", "not an http address|cannot be opened"),
    ],
)
def test_urls_that_are_refused_before_a_lookup(url: str, message: str, lookups: Any) -> None:
    names = lookups(clips_example=["127.0.0.1"])
    with pytest.raises(UnreadableMedia, match=message) as caught:
        Clip.open(url, policy=_policy())
    assert "secret" not in str(caught.value)
    assert not names


def test_web_ports_are_allowed(lookups: Any) -> None:
    for url in ("http://a.example/", "https://a.example/", "http://a.example:443/", "https://a.example:80/"):
        _policy().check_url(url)
    MediaPolicy().check_url("http://a.example:8080/")
    with pytest.raises(UnreadableMedia, match="not an allowed port"):
        MediaPolicy(ports=frozenset({80})).check_url("http://a.example:8080/")


def test_hosts_are_compared_as_names(lookups: Any) -> None:
    policy = MediaPolicy(hosts=frozenset({"Bücher.example"}))
    for host in ("bücher.example", "BÜCHER.example.", "xn--bcher-kva.example"):
        policy.check_url(f"https://{host}/a")
    with pytest.raises(UnreadableMedia, match="not an allowed host"):
        policy.check_url("https://bucher.example/a")


def test_proxies_of_the_environment_are_not_used(
    server: Server, lookups: Any, loopback_is_public: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookups(clips_example=["127.0.0.1"])
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    assert fetch(f"http://clips.example:{server.server_port}/a", _policy(server)) == b"hello"


def test_tls_checks_the_name_and_not_the_address(
    server: Server, lookups: Any, loopback_is_public: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[Any] = []

    class Context:
        def wrap_socket(self, raw: socket.socket, server_hostname: str) -> socket.socket:
            names.append((raw.getpeername()[0], server_hostname))
            return raw

    lookups(clips_example=["127.0.0.1"])
    monkeypatch.setattr(_public.ssl, "create_default_context", Context)
    assert fetch(f"https://Clips.Example.:{server.server_port}/a", _policy(server)) == b"hello"
    assert names == [("127.0.0.1", "clips.example")]


def test_a_server_without_a_certificate_for_the_name_is_refused(
    server: Server, lookups: Any, loopback_is_public: None
) -> None:
    lookups(clips_example=["127.0.0.1"])
    with pytest.raises(UnreadableMedia, match="cannot be loaded"):
        fetch(f"https://clips.example:{server.server_port}/a", _policy(server, max_bytes=100))
    assert not server.asked


def test_an_address_that_does_not_answer_gives_way_to_the_next(
    server: Server, monkeypatch: pytest.MonkeyPatch, loopback_is_public: None
) -> None:
    def lookup(host: str, port: int, **options: Any) -> Any:
        return [*REAL_LOOKUP("127.0.0.1", 9, **options), *REAL_LOOKUP("127.0.0.1", port, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert fetch(f"http://clips.example:{server.server_port}/a", _policy(server)) == b"hello"
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **options: [])
    with pytest.raises(UnreadableMedia, match="has no address"):
        fetch(f"http://clips.example:{server.server_port}/a", _policy(server))

"""https:// inputs against a real HTTPS server: attacks are refused, and what is honest gets through."""

import datetime
import gzip
import ipaddress
import socket
import ssl
import threading
import time
import tracemalloc
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pia_ray.errors import (
    AddressRefused,
    FetchDenied,
    FetchError,
    FetchUnavailable,
    ImageNotFound,
    ImageTooLarge,
)
from pia_ray.storage.addresses import is_public
from pia_ray.storage.https import fetch

PICTURE = bytes(range(256)) * 40
SECRET = "X-Amz-Signature=5ecret"
BOMB = gzip.compress(bytes(80_000_000))
LOOPBACK = ("127.0.0.0/8", "::1/128", "::ffff:127.0.0.0/104")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen.append((self.headers["Host"], self.path))
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.close_connection = True
        getattr(self, "get_" + parts.path.strip("/").partition("/")[0])(query)

    def answer(self, body=b"", status=200, **fields):
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **fields}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def get_picture(self, query):
        self.answer(PICTURE)

    def get_status(self, query):
        self.answer(b"no", status=int(query["code"]))

    def get_redirect(self, query):
        self.answer(status=int(query.get("code", 302)), Location=query["to"])

    def get_chain(self, query):
        left = int(query["left"])
        self.answer(status=302, Location=f"/chain?left={left - 1}") if left else self.answer(PICTURE)

    def get_chunked(self, query):
        self.answer(Transfer_Encoding="chunked", Content_Length=None)
        for _ in range(int(query["chunks"])):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(PICTURE), PICTURE))
        self.wfile.write(b"0\r\n\r\n")

    def get_closed(self, query):
        self.answer(PICTURE, Content_Length=None)

    def get_claims(self, query):
        self.answer(PICTURE, Content_Length=query["bytes"])

    def get_cutchunk(self, query):
        self.answer(b"ff\r\nabc", Transfer_Encoding="chunked", Content_Length=None)

    def get_drip(self, query):
        self.answer(Content_Length="10000")
        self.drip(b"x" * 10_000)

    def get_dripheaders(self, query):
        self.drip(b"HTTP/1.1 200 OK\r\nX-Filler: " + b"x" * 10_000)

    def drip(self, content):
        for byte in content:
            self.wfile.write(bytes([byte]))
            if self.server.closing.wait(0.05):
                return

    def get_garbage(self, query):
        self.wfile.write(b"\0\1\2 this is no HTTP\r\n\r\n")

    def get_silence(self, query):
        pass

    def get_gzip(self, query):
        self.answer(gzip.compress(PICTURE), Content_Encoding="gzip")

    def get_deflate(self, query):
        self.answer(zlib.compress(PICTURE), Content_Encoding="deflate")

    def get_bomb(self, query):
        self.answer(BOMB, Content_Encoding="gzip")

    def get_cutgzip(self, query):
        self.answer(gzip.compress(PICTURE)[:-9], Content_Encoding="gzip")

    def get_notgzip(self, query):
        self.answer(PICTURE, Content_Encoding="gzip")

    def get_brotli(self, query):
        self.answer(PICTURE, Content_Encoding="br")

    def get_headers(self, query):
        self.answer("\n".join(f"{name}: {value}" for name, value in self.headers.items()).encode())

    def log_message(self, *args):
        pass


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        pass  # clients that hang up are what is tested here


def certificate(folder):
    """A self-made certificate and its key in one file, for the names and addresses the tests use."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pictures.test")])
    alternatives = [x509.DNSName(host) for host in ("pictures.test", "other.test", "localhost")]
    alternatives.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "server.pem"
    no_password = serialization.NoEncryption()
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, no_password)
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture(scope="module")
def pem(tmp_path_factory):
    return certificate(tmp_path_factory.mktemp("certificate"))


def serve(pem, address, port=0):
    server = QuietServer((address, port), Handler)
    server.seen = []
    server.closing = threading.Event()
    secured = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    secured.load_cert_chain(pem)
    server.socket = secured.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server


def close(server):
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(pem):
    server = serve(pem, "127.0.0.1")
    yield server
    close(server)


@pytest.fixture(scope="module")
def trusted(pem):
    return ssl.create_default_context(cafile=str(pem))


@pytest.fixture
def get(server, trusted):
    """Fetches from the local server as if it were public, under the name pictures.test."""

    def get_(path, *, host="pictures.test", names=("pictures.test", "other.test"), **options):
        def resolve(name, port):
            if name in names:
                return ["127.0.0.1"]
            raise socket.gaierror(-2, "Name or service not known")

        wanted = {"allowed_networks": ("127.0.0.1/32",), "resolve": resolve, "ssl_context": trusted, **options}
        return fetch(f"https://{host}:{server.port}{path}", **wanted)

    return get_


def unverified():
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


# --- attacks

LOOPBACK_FORMS = [
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0x7f.0.0.1",
    "0177.0.0.1",
    "017700000001",
    "127.0.0.1.",
    "127。0。0。1",
    "１２７.0.0.1",
    "localhost",
    "LOCALHOST",
    "localhost.",
    "0.0.0.0",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[0:0:0:0:0:ffff:7f00:0001]",
]


@pytest.mark.parametrize("host", LOOPBACK_FORMS)
def test_every_way_to_write_loopback_is_refused(server, host):
    url = f"https://{host}:{server.port}/picture"
    with pytest.raises(FetchError) as caught:
        fetch(url, ssl_context=unverified())
    assert not isinstance(caught.value, FetchUnavailable)
    assert server.seen == []


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "017700000001", "127。0。0。1", "localhost."]
)
def test_those_ways_do_lead_to_the_server_where_loopback_is_allowed(server, host):
    url = f"https://{host}:{server.port}/picture"
    assert fetch(url, ssl_context=unverified(), allowed_networks=LOOPBACK) == PICTURE


ADDRESSES = {
    "loopback": "127.0.0.1",
    "loopback elsewhere": "127.8.9.10",
    "this host": "0.0.0.0",
    "this network": "0.1.2.3",
    "private 10": "10.0.0.1",
    "private 172": "172.31.255.255",
    "private 192": "192.168.1.1",
    "carrier-grade NAT": "100.64.0.1",
    "Alibaba metadata": "100.100.100.200",
    "link-local metadata": "169.254.169.254",
    "AWS task metadata": "169.254.170.2",
    "Oracle metadata": "192.0.0.192",
    "protocol assignments": "192.0.0.9",
    "Azure host": "168.63.129.16",
    "6to4 relay": "192.88.99.1",
    "benchmarks": "198.18.0.1",
    "documentation": "203.0.113.5",
    "multicast": "224.0.0.1",
    "reserved": "240.0.0.1",
    "broadcast": "255.255.255.255",
    "v6 unspecified": "::",
    "v6 loopback": "::1",
    "v6 unique local": "fc00::1",
    "AWS metadata over v6": "fd00:ec2::254",
    "Google metadata over v6": "fd20:ce::254",
    "v6 link-local": "fe80::1",
    "v6 link-local with a zone": "fe80::1%lo",
    "v6 site-local": "fec0::1",
    "v6 multicast": "ff02::1",
    "v6 documentation": "2001:db8::1",
    "v6 documentation, new": "3fff::1",
    "v4-mapped loopback": "::ffff:127.0.0.1",
    "v4-mapped metadata": "::ffff:169.254.169.254",
    "v4-mapped Azure": "::ffff:168.63.129.16",
    "v4-translated loopback": "::ffff:0:127.0.0.1",
    "v4-compatible loopback": "::127.0.0.1",
    "6to4 loopback": "2002:7f00:1::1",
    "6to4 metadata": "2002:a9fe:a9fe::1",
    "6to4 of a public address": "2002:808:808::1",
    "NAT64 loopback": "64:ff9b::127.0.0.1",
    "NAT64 metadata": "64:ff9b::a9fe:a9fe",
    "NAT64 Oracle": "64:ff9b::192.0.0.192",
    "NAT64 of local use": "64:ff9b:1::808:808",
    "Teredo": "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "Teredo to metadata": "2001:0:a9fe:a9fe::1",
    "benchmarks v6": "2001:2::1",
    "discard": "100::1",
    "segment routing": "5f00::1",
}


@pytest.mark.parametrize("name", ADDRESSES)
def test_a_name_that_leads_to_an_address_that_is_not_public_is_refused(name):
    with pytest.raises(AddressRefused, match="not public"):
        fetch("https://pictures.test/a.jpg", resolve=lambda host, port: [ADDRESSES[name]])


@pytest.mark.parametrize("name", [name for name, address in ADDRESSES.items() if "%" not in address])
def test_an_address_in_the_url_that_is_not_public_is_refused(name):
    address = ADDRESSES[name]
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(AddressRefused, match="not public"):
        fetch(f"https://{host}/latest/meta-data/")


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "64:ff9b::8.8.8.8", "::ffff:8.8.8.8"]
)
def test_public_addresses_are_public(address):
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("answers", [["8.8.8.8", "127.0.0.1"], ["127.0.0.1", "8.8.8.8"], ["2606:4700::1", "10.0.0.1"]])
def test_a_name_with_one_public_and_one_private_address_is_refused(answers):
    with pytest.raises(AddressRefused, match="not public"):
        fetch("https://pictures.test/a.jpg", resolve=lambda host, port: answers)


def test_a_name_whose_answer_changes_is_looked_up_once_and_pinned(pem, trusted):
    honest = serve(pem, "127.0.0.1")
    inside = serve(pem, "127.0.0.2", honest.port)  # what a rebinding name server would like to reach
    answers = []

    def rebinding(host, port):
        answers.append("127.0.0.2" if answers else "127.0.0.1")
        return [answers[-1]]

    options = {"resolve": rebinding, "ssl_context": trusted, "allowed_networks": ("127.0.0.1/32",)}
    try:
        assert fetch(f"https://pictures.test:{honest.port}/picture", **options) == PICTURE
        assert answers == ["127.0.0.1"]
        with pytest.raises(AddressRefused):
            fetch(f"https://pictures.test:{honest.port}/picture", **options)
        assert len(honest.seen) == 1
        assert inside.seen == []
    finally:
        close(honest)
        close(inside)


def test_a_name_that_changes_between_the_hops_of_a_redirect_is_refused(server, trusted):
    answers = iter(["127.0.0.1", "127.0.0.2"])
    with pytest.raises(AddressRefused, match="redirects"):
        fetch(
            f"https://pictures.test:{server.port}/redirect?to=/picture",
            resolve=lambda host, port: [next(answers)],
            ssl_context=trusted,
            allowed_networks=("127.0.0.1/32",),
        )
    assert [path for _, path in server.seen] == ["/redirect?to=/picture"]


@pytest.mark.parametrize(
    "target",
    [
        "https://127.0.0.2/x",
        "https://169.254.169.254/latest/meta-data/",
        "//169.254.169.254/latest/meta-data/",
        "https://[::1]/x",
        "https://2852039166/latest/meta-data/",
        "http://pictures.test/picture",
        "http://169.254.169.254/",
        "file:///etc/passwd",
        "ftp://pictures.test/picture",
        "gopher://127.0.0.1:6379/_INFO",
        "data:text/plain,hello",
        "https://user:password@pictures.test/picture",
        "https://pictures.test:22/",
    ],
)
@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_to_a_refused_place_is_refused(get, server, target, code):
    with pytest.raises(AddressRefused, match="redirects to where it must not"):
        get(f"/redirect?code={code}&to={quote(target, safe='')}", resolve=redirect_names)
    assert len(server.seen) == 1


def redirect_names(host, port):
    return ["127.0.0.1"] if host == "pictures.test" else [found[4][0] for found in socket.getaddrinfo(host, port)]


@pytest.mark.parametrize("raw", ["größe".encode().decode("latin-1"), "größe", "gr%C3%B6%C3%9Fe"])
def test_a_redirect_is_utf8_as_browsers_read_it_or_else_latin_1(server, get, raw):
    assert get(f"/redirect?to={quote(f'/picture/{raw}', safe='')}") == PICTURE
    assert server.seen[-1][1] == "/picture/gr%C3%B6%C3%9Fe"


def test_a_403_need_not_be_a_signature(get):
    with pytest.raises(FetchDenied, match="may need a login, a browser, or a newer signature"):
        get("/status?code=403")


@pytest.mark.parametrize(
    "url", ["http://pictures.test/a.jpg", "ftp://pictures.test/a", "file:///etc/passwd", "a.jpg", ""]
)
def test_other_schemes_are_refused(url):
    with pytest.raises(AddressRefused, match="only https://"):
        fetch(url)


@pytest.mark.parametrize("port", [0, 22, 25, 80, 442, 444, 1023, 65_536, 99_999_999])
def test_ports_of_other_services_are_refused(port):
    with pytest.raises(AddressRefused, match="port"):
        fetch(f"https://pictures.test:{port}/a.jpg")


@pytest.mark.parametrize(
    "url",
    [
        "https://user@pictures.test/a.jpg",
        "https://user:hush@pictures.test/a.jpg",
        "https://pictures.test:443@127.0.0.1/a.jpg",
        "https://127.0.0.1\\@pictures.test/a.jpg",
        "https://1.1.1.1 &@2.2.2.2# @3.3.3.3/",
    ],
)
def test_credentials_in_the_url_are_refused(url):
    with pytest.raises(AddressRefused, match="credentials") as caught:
        fetch(url)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "https:///a.jpg",
        "https://",
        "https://.pictures.test/",
        "https://pictures..test/",
        f"https://{'a' * 64}.test/",
        f"https://{'a.' * 130}test/",
        "https://pictures%00.test/",
        "https://pictures.test%2f@x/",
        "https://pic tures.test/",
        "https://pictures.test:x/",
        "https://[::1/",
        "https://[1.2.3.4]/",
        "https://[::1%25lo]/",
        "https://pictures\t.test/",
        "https://pictures.test/\r\nX-Evil: 1",
        "https://①②⑦.0.0.1/",
    ],
)
def test_what_is_no_url_is_refused_without_a_lookup(url):
    looked_up = []
    with pytest.raises(FetchError) as caught:
        fetch(url, resolve=lambda host, port: looked_up.append(host) or ["127.0.0.1"])
    assert not caught.value.retryable
    assert looked_up == []


def test_proxies_of_the_environment_are_not_used(get, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert get("/picture") == PICTURE


def test_the_certificate_must_be_for_the_name_and_not_for_the_address(get):
    with pytest.raises(FetchError, match="certificate") as caught:
        get("/picture", host="stranger.test", names=("stranger.test",))
    assert not caught.value.retryable
    with pytest.raises(FetchError, match="certificate"):
        get("/picture", ssl_context=None)  # self-made, so not known to anyone


# --- what is honest


@pytest.mark.parametrize(
    "path", ["/picture", "/chunked?chunks=1", "/closed", "/gzip", "/deflate", "/picture/a%20b/ü.jpg?x=1&y"]
)
def test_a_picture_is_fetched(get, path):
    assert get(path) == PICTURE


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "to", ["/picture", "https://other.test:{port}/picture", "//other.test:{port}/picture", "../picture"]
)
def test_redirects_are_followed(get, server, code, to):
    assert get(f"/redirect?code={code}&to={quote(to.format(port=server.port), safe='')}") == PICTURE
    assert server.seen[1][1] == "/picture"


def test_the_server_hears_the_name_and_no_secrets(get, server):
    heard = get("/headers").decode().splitlines()
    assert f"Host: pictures.test:{server.port}" in heard
    assert "Accept-Encoding: identity" in heard
    assert not any(line.lower().startswith(("cookie", "authorization", "referer")) for line in heard)


def test_a_query_reaches_the_server_unchanged(get, server):
    query = "X-Amz-Credential=AK%2F20260101%2Fus-east-1&X-Amz-Signature=ab12&plus=a+b%2Bc"
    get(f"/picture?{query}")
    assert server.seen[0][1] == f"/picture?{query}"


def test_a_dead_address_gives_way_to_the_next(server, trusted):
    body = fetch(
        f"https://pictures.test:{server.port}/picture",
        resolve=lambda host, port: ["127.0.0.3", "127.0.0.1"],  # nobody listens at the first
        allowed_networks=("127.0.0.0/8",),
        ssl_context=trusted,
    )
    assert body == PICTURE


def test_many_threads_fetch_at_once(get):
    bodies: list[bytes] = []
    threads = [threading.Thread(target=lambda: bodies.append(get("/picture"))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bodies == [PICTURE] * 12


# --- answers and caps


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (404, ImageNotFound),
        (410, ImageNotFound),
        (401, FetchDenied),
        (403, FetchDenied),
        (429, FetchUnavailable),
        (500, FetchUnavailable),
        (503, FetchUnavailable),
        (400, FetchError),
        (418, FetchError),
        (206, FetchError),
        (204, FetchError),
        (300, FetchError),
        (304, FetchError),
    ],
)
def test_each_status_becomes_its_error(get, code, error):
    with pytest.raises((FetchError, ImageNotFound), match=str(code)) as caught:
        get(f"/status?code={code}&{SECRET}")
    assert type(caught.value) is error
    assert "5ecret" not in str(caught.value)


def test_redirects_are_bounded(get, server):
    assert get("/chain?left=5") == PICTURE
    server.seen.clear()
    with pytest.raises(FetchError, match="more than 5 times"):
        get("/chain?left=6")
    assert len(server.seen) == 6
    with pytest.raises(FetchError, match="more than 0 times"):
        get("/chain?left=1", max_redirects=0)


def test_too_many_bytes_are_refused_by_their_declared_length(get):
    with pytest.raises(ImageTooLarge, match="99,999,999"):
        get("/claims?bytes=99999999")


@pytest.mark.parametrize("path", ["/picture", "/closed", "/chunked?chunks=1", "/gzip", "/deflate"])
def test_max_bytes_is_exact(get, path):
    assert get(path, max_bytes=len(PICTURE)) == PICTURE
    with pytest.raises(ImageTooLarge):
        get(path, max_bytes=len(PICTURE) - 1)


def test_too_many_bytes_are_refused_while_they_stream(get):
    with pytest.raises(ImageTooLarge, match="more than"):
        get("/chunked?chunks=3000", max_bytes=1_000_000)


def test_a_compression_bomb_is_not_unpacked(get):
    tracemalloc.start()
    try:
        with pytest.raises(ImageTooLarge, match="more than"):
            get("/bomb", max_bytes=1_000_000)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000  # at its peak, in bytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("path", "error"), [("/notgzip", FetchError), ("/brotli", FetchError), ("/cutgzip", FetchUnavailable)]
)
def test_other_encodings_are_refused(get, path, error):
    with pytest.raises(FetchError) as caught:
        get(path)
    assert type(caught.value) is error


@pytest.mark.parametrize("path", ["/claims?bytes=20000", "/cutchunk", "/garbage", "/silence"])
def test_a_broken_answer_can_be_tried_again(get, path):
    with pytest.raises(FetchUnavailable):
        get(path)


@pytest.mark.parametrize("path", ["/drip", "/dripheaders"])
def test_a_slow_drip_of_bytes_does_not_outlast_the_deadline(get, path):
    # Each byte comes well within the limit, and all of them would come only after minutes.
    with pytest.raises(FetchUnavailable, match="too long"):
        get(path, timeout_s=0.5)


def test_a_server_that_never_speaks_is_given_up(trusted):
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(FetchUnavailable, match="too long"):
        fetch(
            f"https://127.0.0.1:{silent.getsockname()[1]}/",
            timeout_s=0.3,
            allowed_networks=LOOPBACK,
            ssl_context=trusted,
        )


def test_a_name_server_that_never_answers_is_given_up():
    over = threading.Event()

    def silent(host, port):
        over.wait(30)
        return []

    with pytest.raises(FetchUnavailable, match="too long"):
        fetch("https://pictures.test/", timeout_s=0.2, resolve=silent)
    over.set()


def test_time_is_counted_over_all_redirects(get, server):
    def slow(host, port):
        time.sleep(0.2)
        return ["127.0.0.1"]

    with pytest.raises(FetchUnavailable, match="too long"):
        get("/chain?left=5", timeout_s=0.5, resolve=slow)


def test_an_unknown_name_and_a_closed_port_can_be_tried_again(get):
    with pytest.raises(FetchUnavailable, match="does not resolve"):
        get("/picture", host="nowhere.test")
    with socket.create_server(("127.0.0.1", 0)) as closing:
        port = closing.getsockname()[1]
    with pytest.raises(FetchUnavailable):
        fetch(f"https://127.0.0.1:{port}/?{SECRET}", allowed_networks=LOOPBACK)


@pytest.mark.parametrize(
    "path",
    ["/garbage", "/claims?bytes=20000", "/claims?bytes=99999999", "/chain?left=9", "/brotli", "/redirect?to=http://x"],
)
def test_messages_never_repeat_the_query(get, path):
    with pytest.raises((FetchError, ImageTooLarge)) as caught:
        get(f"{path}{'&' if '?' in path else '?'}{SECRET}")
    assert "5ecret" not in str(caught.value)
    assert "pictures.test" in str(caught.value)


def test_nothing_is_logged_above_debug(get, caplog):
    caplog.set_level("INFO")
    get(f"/redirect?to=/picture&{SECRET}")
    assert caplog.records == []


def test_a_message_is_one_line_whatever_the_path(get):
    with pytest.raises(ImageNotFound) as caught:
        get("/status/%0aERROR%0d%1b[31m?code=404")
    assert str(caught.value).isprintable()

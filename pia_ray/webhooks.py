"""Posts JSON to webhooks: signed by the Standard Webhooks scheme, to guarded addresses only.

Source: the Standard Webhooks specification.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import http.client
import ipaddress
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Final
from urllib.parse import SplitResult, urlsplit

from pia_ray.errors import AddressRefused, ConfigError, FetchError, FetchUnavailable
from pia_ray.storage.addresses import Resolver, resolve_by_system

TIMEOUT_S: Final = 5.0

_GONE: Final = 410


class Poster:
    """Posts to webhooks, signed with `secret` (whsec_ and base64), or unsigned without one.

    `allowed_networks`, `resolve` and `ssl_context` are as for `https.fetch`. `plain_http` says whether `http://` URLs
    are taken too, where all their addresses are in `allowed_networks`. `setting` is the secret's name in messages.

    Raises:
        ConfigError: the secret is not valid.
    """

    def __init__(
        self,
        secret: str | None,
        *,
        setting: str = "webhook_secret",
        plain_http: bool = False,
        allowed_networks: Sequence[str] = (),
        resolve: Resolver = resolve_by_system,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._key = None if secret is None else _key_of(secret, setting)
        self._plain_http = plain_http
        self._allowed_networks = allowed_networks
        self._resolve = resolve
        self._ssl_context = ssl_context

    def check(self, url: str) -> None:
        """Refuses a URL that `post` would refuse before it resolves its name.

        Raises:
            AddressRefused, FetchError: as `post`.
        """
        if not (self._plain_http and url.startswith("http://")):
            from pia_ray.storage import https  # brings an HTTP client, which most processes never use

            https.check_url(url)
        elif not (parsed := _split(url)).hostname:
            raise FetchError("That is not a valid URL.")
        elif parsed.username is not None:
            raise AddressRefused("The URL carries credentials, which go over http:// for everyone to read.")

    def post(self, url: str, body: bytes, *, message_id: str, before_body: Callable[[], None] = lambda: None) -> int:
        """The status 2xx of the answer to the body. Every try of one message has the same id. Blocks for about 5 s at
        most.

        `before_body` is called once an https:// server is connected, and keeps the body from being sent by what it
        raises.

        Raises:
            FetchUnavailable: it did not answer 2xx; another try can succeed.
            FetchError: no other try can succeed.
        """
        headers = {"Content-Type": "application/json", "User-Agent": "pia-ray", **self.headers(message_id, body)}
        if self._plain_http and url.startswith("http://"):
            status = self._post_plain(url, body, headers)
        else:
            from pia_ray.storage import https

            status = https.post(
                url,
                body,
                headers=headers,
                before_body=before_body,
                timeout_s=TIMEOUT_S,
                allowed_networks=self._allowed_networks,
                resolve=self._resolve,
                ssl_context=self._ssl_context,
            )
        if status == _GONE:
            raise FetchError("The webhook's server answered 410, which means no more events.", None, status)
        if not 200 <= status < 300:
            raise FetchUnavailable(f"The webhook's server answered {status}.", None, status)
        return status

    def headers(self, message_id: str, body: bytes) -> dict[str, str]:
        """The headers that sign the body and its time, by which the receiver refuses forged and old events."""
        timestamp = str(int(time.time()))
        headers = {"webhook-id": message_id, "webhook-timestamp": timestamp}
        if self._key is None:
            return headers
        signed = hmac.new(self._key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
        return {**headers, "webhook-signature": f"v1,{base64.b64encode(signed).decode()}"}

    def _post_plain(self, url: str, body: bytes, headers: dict[str, str]) -> int:
        """The status of an http:// URL. Connects to the address that was checked, so no name is resolved twice."""
        try:
            parsed = _split(url)
            host, port = parsed.hostname or "", parsed.port or 80
            address = self._allowed_address(host, port)
            connection = http.client.HTTPConnection(address, port, timeout=TIMEOUT_S)
            try:
                target = (parsed.path or "/") + (f"?{parsed.query}" if parsed.query else "")
                connection.request("POST", target, body, {**headers, "Host": parsed.netloc.rpartition("@")[2]})
                return connection.getresponse().status
            finally:
                connection.close()
        except ValueError:
            raise FetchError("That is not a valid URL.") from None
        except (OSError, http.client.HTTPException) as error:
            raise FetchUnavailable(f"http://{host}:{port} could not be reached ({type(error).__name__}).") from None

    def _allowed_address(self, host: str, port: int) -> str:
        allowed = [ipaddress.ip_network(network) for network in self._allowed_networks]
        addresses = list(self._resolve(host, port))
        for address in addresses:
            if not any(ipaddress.ip_address(address) in network for network in allowed):
                raise AddressRefused(f"http:// to {host} ({address}) is refused, which is in no allowed network.")
        if not addresses:
            raise OSError("the name has no addresses")
        return addresses[0]


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        raise FetchError("That is not a valid URL.") from None


def _key_of(secret: str, setting: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) < 16:
        raise ConfigError(f"{setting} must be whsec_ and the base64 of at least 16 random bytes, better 32")
    return key

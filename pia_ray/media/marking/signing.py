"""C2PA manifests in finished videos, signed with the user's certificate. Owns c2pa and cryptography."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from pia_ray import __version__, storage
from pia_ray.config.knob_types import VideoFormat
from pia_ray.config.marking import MarkingConfig
from pia_ray.errors import BadParameter, ConfigError, FetchUnavailable, StorageError, VideoError
from pia_ray.extras import require
from pia_ray.media.marking.xmp import DIGITAL_SOURCE_TYPE
from pia_ray.types import EncodedVideo

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

MIME_OF_SIGNED: Final[Mapping[VideoFormat, str]] = MappingProxyType(
    {"mp4": "video/mp4", "webp": "image/webp", "gif": "image/gif"}
)
"""The formats that have a place for a manifest; webm has none."""

_SETTINGS: Final = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    "builder": {"thumbnail": {"enabled": False}},
}
"""Of the library: it asks no server, apart from that of time stamps, and makes no pictures of its own."""

_PIXEL: Final = bytes.fromhex("47494638396101000100800000000000ffffff2c00000000010001000002024401003b")
_PICTURE: Final = bytes.fromhex("524946461e000000574542505650384c110000002f0000000007d0fffef7bfff8188e87f0000")
"""A gif and a webp of one pixel, a video and a picture to be signed before a run begins."""


@dataclass(frozen=True)
class ManifestSigner:
    """Adds manifests to videos. Any thread may call it."""

    certificates: bytes
    """PEM, the signer's own first."""
    key: bytes
    """PEM."""
    algorithm: str
    timestamp_url: str | None

    def __repr__(self) -> str:
        return f"<ManifestSigner: {self.algorithm}>"

    def sign(self, video: EncodedVideo, *, picture: bytes, model: str) -> EncodedVideo:
        """The video with a manifest: created by `model`, given as name@version, from `picture`, a small webp.

        Signatures hold random numbers, so the bytes differ each time.

        Raises:
            BadParameter: the format has no place for a manifest.
            FetchUnavailable: the server of time stamps gave none.
            VideoError: the library refuses the video.
        """
        content = self._signed(video.content, format=video.format, picture=picture, model=model)
        return replace(video, content=content, sha256=hashlib.sha256(content).hexdigest())

    def _signed(self, content: bytes, *, format: VideoFormat, picture: bytes, model: str) -> bytes:  # noqa: A002
        import c2pa  # here, because only who signs needs the extra

        mime, signed = MIME_OF_SIGNED[require_signable(format)], io.BytesIO()
        info = c2pa.C2paSignerInfo(self.algorithm, self.certificates, self.key, self.timestamp_url)
        try:
            with (
                c2pa.Context.from_dict(_SETTINGS) as context,
                c2pa.Signer.from_info(info) as signer,
                c2pa.Builder.from_json(json.dumps(_manifest(model)), context) as builder,
            ):
                builder.add_resource("picture.webp", io.BytesIO(picture))
                builder.add_ingredient(json.dumps(_INGREDIENT), "image/webp", io.BytesIO(picture))
                builder.sign(signer, mime, io.BytesIO(content), signed)
        except c2pa.C2paError as error:
            if self.timestamp_url is not None and any(word in str(error).lower() for word in ("http", "timestamp")):
                raise FetchUnavailable(f"no time stamp from {self.timestamp_url}: {error}") from None
            raise VideoError(f"the {format} could not be signed: {error}") from None
        return signed.getvalue()


_INGREDIENT: Final = {
    "title": "picture",
    "relationship": "inputTo",
    "label": "picture",
    "thumbnail": {"format": "image/webp", "identifier": "picture.webp"},
}


def _manifest(model: str) -> dict[str, Any]:
    name, _, version = model.partition("@")
    action = {
        "action": "c2pa.created",
        "digitalSourceType": DIGITAL_SOURCE_TYPE,
        "softwareAgent": {"name": name} | ({"version": version} if version else {}),
        "parameters": {"ingredientIds": ["picture"]},
    }
    return {
        "claim_generator_info": [{"name": "pia-ray", "version": __version__}],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
    }


def require_signable(format: VideoFormat) -> VideoFormat:  # noqa: A002 - the field's word
    """The format, where it has a place for a manifest.

    Raises:
        BadParameter: it has none.
    """
    if format not in MIME_OF_SIGNED:
        raise BadParameter(f"{format} has no place for a C2PA manifest: use {', '.join(MIME_OF_SIGNED)}", "format")
    return format


def signer_of(config: MarkingConfig) -> ManifestSigner | None:
    """The signer of a run's or endpoint's videos, read once in a process; None where it signs none.

    Raises:
        ConfigError: certificate or key cannot be read or used, or do not fit each other.
    """
    if config.c2pa_certificate is None or config.c2pa_key is None:
        return None
    return _signer(config.c2pa_certificate, config.c2pa_key, config.c2pa_timestamp_url)


def check_signing(config: MarkingConfig, *, format: VideoFormat = "mp4") -> None:  # noqa: A002 - the field's word
    """Signs one pixel, so that what is wrong with certificate, key or time stamps is known before any work.

    Raises:
        ConfigError: as `signer_of`; or videos of that format cannot be signed, the library refuses certificate or key,
            or the server of time stamps gives none.
    """
    signer = signer_of(config)
    if signer is None:
        return
    try:
        require_signable(format)
        signer._signed(_PIXEL, format="gif", picture=_PICTURE, model="check")
    except BadParameter as error:
        raise ConfigError(f"{error.message}, or leave c2pa_certificate out") from None
    except (FetchUnavailable, VideoError) as error:
        raise ConfigError(f"c2pa_certificate {config.c2pa_certificate} cannot sign: {error.message}") from None


@cache
def _signer(certificate: str, key: str, timestamp_url: str | None) -> ManifestSigner:
    require("c2pa", purpose="c2pa_certificate")
    certificates, key_pem = _read("c2pa_certificate", certificate), _read("c2pa_key", key)
    own = _own_certificate(certificate, certificates)
    return ManifestSigner(certificates, key_pem, _algorithm(key, key_pem, certificate, own), timestamp_url)


def _read(setting: str, uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except StorageError as error:
        raise ConfigError(f"{setting}: {error.message}") from None


def _own_certificate(uri: str, content: bytes) -> Certificate:
    from cryptography import x509

    try:
        own = x509.load_pem_x509_certificates(content)[0]
    except ValueError:
        raise ConfigError(
            f"c2pa_certificate {uri} is not a chain of PEM certificates, the signer's own first"
        ) from None
    now = datetime.now(UTC)
    if now > own.not_valid_after_utc:
        raise ConfigError(f"c2pa_certificate {uri} has expired on {own.not_valid_after_utc:%Y-%m-%d}: renew it")
    if now < own.not_valid_before_utc:
        raise ConfigError(f"c2pa_certificate {uri} is valid from {own.not_valid_before_utc:%Y-%m-%d} only")
    return own


def _algorithm(uri: str, content: bytes, certificate_uri: str, certificate: Certificate) -> str:
    """The name of the signature algorithm of that key."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # their messages are not quoted: the key is secret
        raise ConfigError(f"c2pa_key {uri} is not a private key in PEM without a password") from None
    if key.public_key() != certificate.public_key():
        raise ConfigError(f"c2pa_key {uri} does not fit the first certificate of {certificate_uri}")
    if isinstance(key, ec.EllipticCurvePrivateKey):
        curves = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
        algorithm = curves.get(key.curve.name)
    else:
        algorithm = "ps256" if isinstance(key, rsa.RSAPrivateKey) else None
        algorithm = "ed25519" if isinstance(key, ed25519.Ed25519PrivateKey) else algorithm
    if algorithm is None:
        raise ConfigError(f"c2pa_key {uri} is of a kind that C2PA has no algorithm for: use EC P-256, RSA or Ed25519")
    return algorithm

"""Image references as written -> where the picture lies, and what a work key says of it.

A picture is identified by its reference without a URL's signature, bytes by their sha256; no request per row.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import posixpath
import re
from typing import Final
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from pia_ray import storage
from pia_ray.errors import BadParameter
from pia_ray.manifest.spellings import fetched_url, written_out
from pia_ray.storage import sources

_SCHEME: Final = re.compile(r"\s*([a-zA-Z][a-zA-Z0-9+.-]*):")
_SIGNATURES: Final = ("x-amz-", "x-goog-")
_SIGNED_BY: Final = {
    "signature": {"signature", "expires", "awsaccesskeyid", "googleaccessid", "key-pair-id", "policy"},
    "sig": {
        "sig",
        "se",
        "sp",
        "sv",
        "sr",
        "st",
        "spr",
        "sip",
        "ss",
        "srt",
        "sks",
        "skt",
        "ske",
        "skv",
        "skoid",
        "sktid",
    },
}
"""Query parameters that renew with every signing, by the one that gives a signature away (S3, CloudFront; Azure)."""


def locate(reference: str, folder: str, prefix: str = "", *, what: str = "image") -> tuple[str, str]:
    """The URI and the identity of a picture, for a reference in a manifest that lies in `folder`.

    `folder` ends with a slash. `what` is the knob that refers to it. `prefix` goes before the identity of a relative
    reference: the folder of its manifest below the root of all, so that two folders' `1.png` stay two pictures.

    Raises:
        BadParameter: the reference names nothing that can be read; says why.
    """
    _require_unicode(reference, what)
    if not _UNUSUAL.search(reference):
        return folder + reference, prefix + reference
    if reference.startswith("s3://") and not _UNUSUAL.search(reference, 5):  # the other common case
        slash = reference.find("/", 6)
        if 0 < slash < len(reference) - 1:
            return reference, reference
    reference = reference.strip()
    if not reference:
        raise BadParameter(f"{what} is missing or null: give each row a path, URL or bytes", what)
    if "\0" in reference:
        raise BadParameter(f"{what} holds a NUL character", what)
    reference = written_out(reference, folder, what=what)
    match = _SCHEME.match(reference)
    scheme = match[1].lower() if match else ""
    if scheme == "https":
        return _at_https("https" + reference[5:], what)
    if scheme == "data":
        return "data" + reference[4:], identity_of_bytes(decode_data_url(reference, what=what))
    if scheme == "s3" and reference[3:].startswith("//"):
        return _in_s3(reference, what)
    if scheme == "http":
        return "http" + reference[4:], unsigned("http" + reference[4:])
    if reference.startswith("/") or scheme == "file":
        if sources.in_store(folder):
            store = "S3" if storage.is_s3(folder) else "a store"
            raise BadParameter(f"{what} {reference}: a manifest in {store} cannot name files of one machine", what)
        return (reference if scheme != "file" else _path_of(reference, what)), reference
    if match and sources.other_scheme(reference):
        if reason := sources.refusal(reference):
            raise BadParameter(f"{what} {_short(redacted(reference))}: {reason}", what)
        reference = scheme + reference[len(scheme) :]
        return reference, unsigned(reference)
    if match and "//" in reference:
        raise BadParameter(f"{what} {_short(reference)}: {scheme}:// is not read; {sources.READ_SCHEMES}", what)
    return _below(folder, reference, what), prefix + reference


def require_fetched(uri: str, *, allow_http: bool, what: str = "image") -> None:
    """Refuses a located http:// URL where the run does not allow such.

    Raises:
        BadParameter: that is so.
    """
    if not allow_http and uri[:5] == "http:":
        raise BadParameter(
            f"{what} {_short(uri)}: http:// is not fetched; use https:// or s3://, or allow it with --allow-http", what
        )


# Anything but a plain relative path: a scheme, dots, an absolute or empty path, whitespace at an end, NUL, a host.
_UNUSUAL: Final = re.compile(r"[:\0]|//|\./|^[\s/]|\s$|^$|^\\\\|^[wW]{3}\.")


def is_unicode(text: str) -> bool:
    """Whether the text has no lone surrogates, which no file can hold: what JSON escapes and odd file names leave."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def identity_of_bytes(content: bytes) -> str:
    """`sha256:<hex>`."""
    return "sha256:" + hashlib.sha256(content).hexdigest()


def stem(reference: str) -> str:
    """The file's name without folders, query and extension, for people; "image" where there is none."""
    if reference[:5].lower() == "data:":
        return "image"
    # Not urlsplit, which raises for hosts that are not valid: the fetch refuses those, row by row.
    path = reference.partition("?")[0].partition("#")[0] if reference[:6].lower() == "https:" else reference
    return posixpath.splitext(posixpath.basename(path.rstrip("/")))[0][:64].replace("\0", "") or "image"


def redacted(reference: str) -> str:
    """The reference as results may hold it: no signature or password, and of a data: URL its kind and hash alone."""
    if reference.startswith("data:"):
        head = reference.partition(",")[0]
        return f"{head[:64]},{identity_of_bytes(reference.encode())}"
    return sources.without_password(unsigned(reference)) if "://" in reference else reference


def unsigned(url: str) -> str:
    """The URL without its signature's query parameters; all others keep their text and order."""
    head, question, query = url.partition("?")
    if not question:
        return url
    query, hash_sign, fragment = query.partition("#")
    names = {part.partition("=")[0].lower() for part in query.split("&")}
    dropped = {name for name in names if name.startswith(_SIGNATURES)}
    for sign, others in _SIGNED_BY.items():
        if sign in names:
            dropped |= others
    kept = "&".join(part for part in query.split("&") if part.partition("=")[0].lower() not in dropped)
    return head + (question + kept if kept else "") + hash_sign + fragment


def decode_data_url(url: str, *, what: str = "image") -> bytes:
    """The content of a `data:` URL.

    Raises:
        BadParameter: it is not a data: URL, or its base64 is damaged.
    """
    head, comma, text = url.partition(",")
    if not comma or not head.lower().startswith("data:"):
        raise BadParameter(f"{what} is not a valid data: URL, which is data:[<type>][;base64],<content>", what)
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(text)
    try:
        return base64.b64decode("".join(unquote(text).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadParameter(f"{what} is a data: URL with damaged base64: {error}", what) from None


def _at_https(url: str, what: str) -> tuple[str, str]:
    """The URL that is fetched, and its identity."""
    if url[5:8] != "://" or url[8:9] in "/?#":  # which the end of the text is too
        raise BadParameter(f"{what} {_short(url)} names no host: https://HOST/PATH is needed", what)
    fetched = fetched_url(url)
    return fetched, unsigned(url) if unsigned(fetched) == fetched else unsigned(fetched)


def _in_s3(reference: str, what: str) -> tuple[str, str]:
    """The object's URI, which is its identity too."""
    bucket, _, key = reference[5:].partition("/")
    if not bucket or not key:
        raise BadParameter(f"{what} {reference} names no object: s3://bucket/key is needed", what)
    return f"s3://{bucket}/{key}", f"s3://{bucket}/{key}"


def _path_of(url: str, what: str) -> str:
    """The path of a file:// URL."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise BadParameter(f"{what} {_short(url)} is not a valid file:// URL: {error}", what) from None
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise BadParameter(f"{what} {url}: a file:// URL needs three slashes and an absolute path", what)
    return unquote(parts.path)


def _below(folder: str, reference: str, what: str) -> str:
    if not sources.in_store(folder):
        return posixpath.normpath(folder + reference)
    scheme, _, place = folder.partition("://")
    bucket, _, key = place.partition("/")
    path = key + reference
    if {".", ".."} & set(path.split("/")):
        path = posixpath.normpath(path)
    if path.startswith("../") or path in ("..", "."):
        raise BadParameter(f"{what} {reference} leads out of the bucket", what)
    return f"{scheme}://{bucket}/{path}"


def _require_unicode(reference: str, what: str) -> None:
    if not is_unicode(reference):
        shown = _short(reference.encode("utf-8", "backslashreplace").decode())
        raise BadParameter(f"{what} {shown} is not valid Unicode (it holds a lone surrogate): rename the file", what)


def _short(reference: str) -> str:
    return reference if len(reference) <= 120 else reference[:117] + "..."

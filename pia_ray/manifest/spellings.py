"""References as browsers and file systems read them, where the plain reading names nothing.

Identities stay as written: a work key does not depend on the spelling that was found.
"""

from __future__ import annotations

import html
import posixpath
import re
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, unquote, urlencode

from pia_ray.errors import BadParameter, StorageError
from pia_ray.storage import sources

_HOST_FIRST: Final = re.compile(r"//(?P<host>[a-zA-Z0-9-]+(?:\.[a-zA-Z0-9-]+)+(?::\d+)?)/.")
_WWW: Final = re.compile(r"(?P<host>www\.[a-zA-Z0-9-]+(?:\.[a-zA-Z0-9-]+)+)/.", re.IGNORECASE)
_WINDOWS: Final = re.compile(r"[a-zA-Z]:[\\/](?!/)|\\\\")
_DRIVE: Final = re.compile(r"https://(?:drive|docs)\.google\.com/(?:file/d/(?P<file>[\w-]+)|open\?(?P<query>.*))")
_DROPBOX: Final = re.compile(r"https://(?:www\.)?dropbox\.com/(?:s|scl/fi)/[^?#]+(?:\?(?P<query>[^#]*))?")
_MOST: Final = 16


def written_out(reference: str, folder: str, *, what: str) -> str:
    """The reference with the scheme that a browser or Hadoop would take it to have.

    Raises:
        BadParameter: it is a path of a Windows machine.
    """
    if reference[:6].lower() in ("s3a://", "s3n://"):
        return f"s3://{reference[6:]}"
    if _HOST_FIRST.match(reference):
        return f"https:{reference}"
    if (match := _WWW.match(reference)) and not _is_folder(f"{folder}{match['host']}/"):
        return f"https://{reference}"
    if _WINDOWS.match(reference):
        raise BadParameter(
            f"{what} {reference[:120]} is a path of a Windows machine: write it relative to the manifest, such as "
            f"pictures/a.jpg",
            what,
        )
    return reference


def fetched_url(url: str) -> str:
    """The https:// URL to fetch: without HTML's `&amp;`, and of a share link of Google Drive or Dropbox the file's."""
    if "&amp;" in url:
        url = html.unescape(url)
    if match := _DRIVE.match(url):
        file = match["file"] or dict(parse_qsl(match["query"] or "")).get("id")
        return f"https://drive.google.com/uc?{urlencode({'export': 'download', 'id': file})}" if file else url
    if match := _DROPBOX.match(url):
        query = [
            pair for pair in parse_qsl(match["query"] or "", keep_blank_values=True) if pair[0] not in ("dl", "raw")
        ]
        return f"{url.partition('?')[0].partition('#')[0]}?{urlencode([*query, ('dl', '1')])}"
    return url


def other_spellings(uri: str) -> list[str]:
    """Other names of a local file or an object: slashes for backslashes, without escapes, in Unicode's other form."""
    found = [uri]
    for spelled in (html.unescape, _with_slashes, unquote):
        found += [new for old in found if (new := spelled(old)) not in found]
    for form in ("NFC", "NFD"):
        found += [new for old in found if (new := unicodedata.normalize(form, old)) not in found]
    return [new for new in found[1:_MOST] if "\0" not in new]


def _with_slashes(uri: str) -> str:
    if "\\" not in uri:
        return uri
    store = uri[: uri.find("://") + 3] if sources.in_store(uri) else ""
    root, _, rest = uri.removeprefix(store).partition("/")
    path = posixpath.normpath("/" + rest.replace("\\", "/"))
    return f"{store}{root}{path}"


@lru_cache(maxsize=1024)
def _is_folder(uri: str) -> bool:
    if not sources.in_store(uri):
        return Path(uri).is_dir()
    try:
        return next(iter(sources.list_objects(uri)), None) is not None
    except StorageError:
        return False

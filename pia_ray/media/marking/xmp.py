"""The XMP packet that says that a file is generated, and in webp how it was made.

Source: XMP specification part 1 and 3, Adobe; IPTC Photo Metadata Standard, "Digital Source Type".
"""

from __future__ import annotations

import re
from typing import Final

DIGITAL_SOURCE_TYPE: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
"""IPTC's term for media in which a trained model's output and other content, here the picture, are put together."""

_START: Final = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    ' xmlns:dc="http://purl.org/dc/elements/1.1/">'
    f"<Iptc4xmpExt:DigitalSourceType>{DIGITAL_SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>"
)
_END: Final = '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'

_NOTE_START: Final = '<dc:description><rdf:Alt><rdf:li xml:lang="x-default">'
_NOTE_END: Final = "</rdf:li></rdf:Alt></dc:description>"


def mark_packet(note: str = "") -> bytes:
    """The packet with the mark, and with `note` as the description where there is one."""
    text = note.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f"{_START}{_NOTE_START + text + _NOTE_END if note else ''}{_END}".encode()


def note_in(packet: bytes) -> str:
    """The note in a packet of ours, by its exact frame: no XML parser is fed with a file from elsewhere."""
    frame = re.escape(_NOTE_START) + "(.*?)" + re.escape(_NOTE_END)
    found = re.search(frame, packet.decode("utf-8", "replace"), re.DOTALL)
    return found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") if found else ""

"""What a finished file says about itself: that it is generated, and how it was made.

Writes and removes metadata in finished mp4, webm, webp and gif without encoding them anew. Knows no pixels.
"""

from pia_ray.config.marking import ProvenanceLevel
from pia_ray.media.marking.levels import at_level
from pia_ray.media.marking.metadata import is_marked, strip_provenance, write_metadata
from pia_ray.media.marking.signing import ManifestSigner, check_signing, require_signable, signer_of
from pia_ray.media.marking.xmp import DIGITAL_SOURCE_TYPE, mark_packet, note_in

__all__ = [
    "DIGITAL_SOURCE_TYPE",
    "ManifestSigner",
    "ProvenanceLevel",
    "at_level",
    "check_signing",
    "is_marked",
    "mark_packet",
    "note_in",
    "require_signable",
    "signer_of",
    "strip_provenance",
    "write_metadata",
]

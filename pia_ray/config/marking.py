"""`MarkingConfig`, the settings by which finished videos say that they are generated and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pia_ray.config.settings import Settings

ProvenanceLevel = Literal["full", "public", "none"]
"""The part of its making that a file states: all, the model and the work key, or that it is generated alone."""


class MarkingConfig(Settings):
    """The metadata of finished videos, and their C2PA manifests."""

    provenance: ProvenanceLevel = Field(
        "full",
        description="Metadata in the videos: all of their making, the model and work key alone (public), or none. The "
        "mark that they are generated stays.",
    )
    c2pa_certificate: str | None = Field(
        None,
        description="PEM file of the certificate, with its chain, that signs a C2PA manifest in each video; local or "
        "s3://. Left out: no manifest.",
    )
    c2pa_key: str | None = Field(
        None, description="PEM file of its private key, without a password; local or s3://. Never recorded or logged."
    )
    c2pa_timestamp_url: str | None = Field(
        None,
        pattern="^https?://",
        description="Server of time stamps (RFC 3161) for manifests. Left out: none; the manifest ends with its "
        "certificate.",
    )

    @model_validator(mode="after")
    def _certificate_with_key(self) -> MarkingConfig:
        if (self.c2pa_certificate is None) != (self.c2pa_key is None):
            raise ValueError("c2pa_certificate and c2pa_key must be given together")
        if self.c2pa_timestamp_url is not None and self.c2pa_certificate is None:
            raise ValueError("c2pa_timestamp_url needs c2pa_certificate and c2pa_key")
        return self

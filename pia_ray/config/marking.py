"""`MarkingConfig`, the settings by which finished videos say that they are generated and how."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

ProvenanceLevel = Literal["full", "public", "none"]
"""How much of its making a file tells: all, the model and the work key, or no more than that it is generated."""


class MarkingConfig(BaseModel):
    """The metadata of finished videos."""

    provenance: ProvenanceLevel = Field(
        "full",
        description="Metadata in the videos: all of their making, the model and work key alone (public), or none. The "
        "mark that they are generated stays.",
    )

"""Lists in the wire format of the OpenAI API: a page of objects, and the id after which the next page begins."""

from __future__ import annotations

from typing import Generic, Literal, Self, TypeVar

from pydantic import BaseModel, Field


class Listed(BaseModel):
    """An object of a list."""

    id: str


Item = TypeVar("Item", bound=Listed)


class Listing(BaseModel, Generic[Item]):
    """Part of a list. Clients go on from `last_id` while `has_more`."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    first_id: str | None
    last_id: str | None

    @classmethod
    def of(cls, items: list[Item], *, more: bool) -> Self:
        """The part with these objects; `more` says whether others follow."""
        ends = (items[0].id, items[-1].id) if items else (None, None)
        return cls(data=items, has_more=more, first_id=ends[0], last_id=ends[1])


class PageQuery(BaseModel):
    """The query parameters of a list."""

    after: str | None = Field(None, description="The last_id of the page before.", max_length=100)

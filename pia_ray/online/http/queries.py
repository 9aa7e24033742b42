"""The query parameters of the routes below /v1: those that a route does not know are refused, and those given twice."""

from __future__ import annotations

from collections import Counter

from fastapi import Request
from fastapi.exceptions import RequestValidationError


def check_query(request: Request) -> None:
    """Refuses a request whose query has a parameter that its route does not know, or one twice.

    The OpenAPI document says which it knows; a route that is not in there knows none.

    Raises:
        RequestValidationError: names the first of them.
    """
    given = Counter(name for name, _ in request.query_params.multi_items())
    if not given:
        return
    path = getattr(request.scope.get("route"), "path", "")
    route = request.app.openapi()["paths"].get(path, {}).get(request.method.lower(), {})
    known = {each["name"] for each in route.get("parameters", ()) if each["in"] == "query"}
    for name, times in given.items():
        if name not in known:
            raise RequestValidationError([{"type": "extra_forbidden", "loc": ("query", name), "msg": ""}])
        if times > 1:
            raise RequestValidationError([{"type": "twice", "loc": ("query", name), "msg": "is given twice"}])

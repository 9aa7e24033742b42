"""The API reference at /page/reference.html: the OpenAPI document as one static page, without scripts and other sites.

It holds what the package says of its routes, and nothing of this endpoint's settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, Final

Schema = Mapping[str, Any]

_REFERENCE: Final = "#/components/schemas/"


def reference_page(document: Schema) -> str:
    """The page of an OpenAPI document."""
    info, schemas = document["info"], document["components"]["schemas"]
    calls = [
        (method.upper(), path, call)
        for path, calls in sorted(document["paths"].items())
        for method, call in calls.items()
    ]
    links = "".join(
        f'<li><a href="#{escape(call["operationId"])}"><code>{method} {escape(path)}</code></a> '
        f"{escape(call['summary'])}</li>"
        for method, path, call in calls
    )
    names = "".join(f'<li><a href="#schema-{escape(name)}">{escape(name)}</a></li>' for name in sorted(schemas))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>API reference · {escape(info['title'])} {escape(info['version'])}</title>"
        '<link rel="icon" href="data:,"><link rel="stylesheet" href="page.css"></head><body class="reference">'
        f"<header><h1>API reference</h1><p>{escape(info['title'])} {escape(info['version'])}. "
        f"{_text(info['description'])}</p><p>The OpenAPI document is <code>GET /openapi.json</code>.</p></header>"
        f'<main><section class="card"><h2>Calls</h2><ul>{links}</ul><h2>Objects</h2><ul>{names}</ul></section>'
        + "".join(_call(method, path, call) for method, path, call in calls)
        + "".join(_object(name, schemas[name]) for name in sorted(schemas))
        + "</main></body></html>\n"
    )


def _call(method: str, path: str, call: Schema) -> str:
    parameters = [
        (f"{each['name']} ({each['in']})", each["schema"], each.get("description", ""), each.get("required", False))
        for each in call.get("parameters", ())
    ]
    parts = [
        f'<section class="card" id="{escape(call["operationId"])}"><h2><code>{method} {escape(path)}</code></h2>',
        f"<p>{escape(call['summary'])}. {_text(call.get('description', ''))}</p>",
        _table("Parameters", parameters),
    ]
    for kind, content in call.get("requestBody", {}).get("content", {}).items():
        parts.append(_table(f"Body: {kind}", list(_fields(content.get("schema", {})))))
    answers = "".join(
        f"<tr><td><code>{escape(status)}</code></td><td>{_text(answer.get('description', ''))}</td>"
        f"<td>{', '.join(_content(kind, each) for kind, each in answer.get('content', {}).items())}</td></tr>"
        for status, answer in sorted(call["responses"].items())
    )
    parts.append(f"<h3>Answers</h3><table>{answers}</table></section>")
    return "".join(parts)


def _object(name: str, schema: Schema) -> str:
    text = f"<p>{_text(schema.get('description', ''))}</p>"
    fields = _table("Fields", list(_fields(schema)))
    return f'<section class="card" id="schema-{escape(name)}"><h2>{escape(name)}</h2>{text}{fields}</section>'


def _fields(schema: Schema) -> Iterator[tuple[str, Schema, str, bool]]:
    """Name, schema, description and necessity of the fields of an object."""
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        yield name, field, field.get("description", ""), name in required


def _table(title: str, fields: list[tuple[str, Schema, str, bool]]) -> str:
    if not fields:
        return ""
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code>{' <b>required</b>' if required else ''}</td>"
        f"<td>{_kind(schema)}</td><td>{_text(text)}</td></tr>"
        for name, schema, text, required in fields
    )
    return f"<h3>{escape(title)}</h3><table>{rows}</table>"


def _kind(schema: Schema) -> str:
    """The type of a value, its bounds and its default."""
    if (reference := schema.get("$ref")) is not None:
        name = escape(str(reference).removeprefix(_REFERENCE))
        return f'<a href="#schema-{name}">{name}</a>'
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_kind(each) for each in choices))
    if "const" in schema or "enum" in schema:
        return ", ".join(f"<code>{escape(str(each))}</code>" for each in schema.get("enum", [schema.get("const")]))
    kinds = schema.get("type", "any")
    kind = escape(kinds if isinstance(kinds, str) else " or ".join(kinds))
    if kind == "array":
        kind += f" of {_kind(schema.get('items', {}))}"
    words = [escape(str(schema["format"]))] if "format" in schema else []
    bounds = (("from", "minimum"), ("above", "exclusiveMinimum"), ("to", "maximum"), ("below", "exclusiveMaximum"))
    words += [f"{word} {schema[name]:g}" for word, name in bounds if name in schema]
    if schema.get("default") is not None:
        words.append(f"default <code>{escape(str(schema['default']))}</code>")
    return kind + (f" ({', '.join(words)})" if words else "")


def _content(kind: str, content: Schema) -> str:
    schema = content.get("schema", {})
    return f"<code>{escape(kind)}</code>" + (f" {_kind(schema)}" if "$ref" in schema else "")


def _text(text: str) -> str:
    """Text in which code stands between backquotes."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if at % 2 else part for at, part in enumerate(parts))

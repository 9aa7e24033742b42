"""Requests of HTTP bodies: reading, aliases, limits, and the OpenAPI entries."""

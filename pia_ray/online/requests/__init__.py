"""From the body of an HTTP request to an `AnimationRequest`: reading, names, bodies, and the OpenAPI document."""

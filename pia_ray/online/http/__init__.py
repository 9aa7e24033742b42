"""The parts that all routes share: middleware, API keys, limits, error responses, metrics, pagination, downloads."""

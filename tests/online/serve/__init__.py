"""Tests behind a real Ray Serve, which they share and which ends with the last of them."""

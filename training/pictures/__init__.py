"""Draws the pictures and the manifest of the bundled catalogue, which `pia_ray/demo/catalog` holds."""

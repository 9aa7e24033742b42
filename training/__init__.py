"""Trains the bundled demo model on drawn pictures alone: `python -m training.vae`, `.unet`, `.export`, `.evaluate`.

A top-level package beside pia_ray, which never imports it; it is not part of the wheel.
"""

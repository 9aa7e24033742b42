"""The bundled demo: a tiny model, and a catalogue of pictures drawn by `python -m pia_ray.demo.draw`."""

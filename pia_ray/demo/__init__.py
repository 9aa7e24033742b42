"""The bundled demo: a tiny model, and a catalogue of pictures drawn by `python -m training.pictures.draw`."""

"""The Ray Data wing: a catalogue in, videos and a results table out."""

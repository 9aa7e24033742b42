"""Settings: the knobs of an animation and how they resolve; the frozen configs of a model, a run and an endpoint."""

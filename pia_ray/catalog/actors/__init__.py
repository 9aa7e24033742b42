"""The actors of a run on Ray: their pool, their talk with the driver, their metrics."""

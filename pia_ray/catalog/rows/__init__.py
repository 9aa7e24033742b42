"""The stages of one row in a worker: their limits, waits, tries, locks and failures."""

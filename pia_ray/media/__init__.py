"""Pictures, arrays and videos as bytes and in memory. Knows no model, no storage and no Ray."""

"""The parts that depend on the device: placement, memory, batch sizes, timing, and the meaning of its errors."""

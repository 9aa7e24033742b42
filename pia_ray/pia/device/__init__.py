"""What depends on the device: placement, memory, batch sizes, timing, and what its errors mean."""

"""Tests on a cluster of several nodes, which they share and which ends with the last of them."""

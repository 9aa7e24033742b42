"""From files of weights to `Components`: checkpoints, LoRAs, textual inversions, IP-Adapters, offloading."""

"""The UNet over packed evaluations: its forward, the rewrites that make that cheaper, and its compilation."""

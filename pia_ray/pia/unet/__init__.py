"""The UNet over packed evaluations: its forward, the rewrites that make the forward cheaper, and its compilation."""

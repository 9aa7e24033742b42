"""How one row is denoised: noise, schedule, conditions, windows, guidance. Runs no UNet: it yields evaluations."""

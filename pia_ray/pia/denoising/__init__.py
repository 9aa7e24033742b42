"""The denoising of one row: noise, schedule, conditions, windows, guidance. Runs no UNet: it yields evaluations."""

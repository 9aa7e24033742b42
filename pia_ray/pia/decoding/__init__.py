"""From denoised latents to frames: VAE decode, output types, the motion score."""

"""The model: PIA's sampler on diffusers' components. torch and diffusers live here and nowhere else."""

"""The mathematics of diffusion: schedules, the forward process, samplers, guidance. Knows no network and no file."""

"""Diffusion models that outlive their jobs. Importing this package loads no torch: the modules that need it do."""

__version__ = "0.1.0"

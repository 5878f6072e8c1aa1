"""The network: U-Net, average, building and loading one, what `auto` becomes on a device. Knows no job, and of a run
its weights alone."""

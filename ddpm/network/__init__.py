"""The network: U-Net, average of its weights, building and loading it, what `auto` becomes on a device. Knows no job,
and of a run only its weights."""

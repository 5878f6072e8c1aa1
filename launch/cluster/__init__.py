"""The machine: what this process was started as, what SLURM says, what the site is like.

Must not know how jobs of ours are made, or what they do.
"""

"""The cluster: what this process was started as, what the site is like, and all that is known of its scheduler.

Owns what a job of ours asks for, how it is queued, and every question and order to SLURM. The others come in by
scheduler.py. Batch shells are in slurm/, and how a life answers SLURM's signals in launch/life/. Must not know which
jobs a run needs (launch/queue/), or what a job does (launch/life/).
"""

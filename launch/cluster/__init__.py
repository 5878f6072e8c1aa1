"""The cluster: the environment of this process, the site profile, and everything about the scheduler.

Owns what a job asks for, how it is queued, and every query and order to SLURM. Other rooms use scheduler.py alone.
Batch shells are in slurm/; launch/life/ answers SLURM's signals. Must not know which jobs a run needs (launch/queue/),
or what a job does (launch/life/).
"""

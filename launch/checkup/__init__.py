"""Whether this account, on this cluster, can do what a submission will ask for: told before anything is queued.

Each finding is a fact and, where something is to be done, what. Loads no torch; a node's torch is asked by a job.
"""

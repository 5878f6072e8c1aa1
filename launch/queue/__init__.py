"""Jobs on their way: made, submitted or started here, waited for, and what of a run is left for the next one.

Owns which jobs a run needs and how they get going. Must not know what a job does once it runs (launch/life/), or the
scheduler but by launch/cluster/scheduler.py.
"""

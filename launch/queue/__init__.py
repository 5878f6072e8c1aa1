"""Jobs before they run: made, submitted or started here, waited for; and what a run still needs.

Owns which jobs a run needs and how they get going. Must not know what a job does once it runs (launch/life/), or the
scheduler except through launch/cluster/scheduler.py.
"""

"""Jobs on their way: made, submitted or started here, waited for, and what of a run is left for the next one.

Owns what a job is and how it gets going. Must not know what a job does once it runs (launch/life/).
"""

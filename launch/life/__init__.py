"""One start of a job: signals, the work of its stage, and whether it is requeued. Asks queue/ what a run still
needs."""

"""One start of one job: signals, the work of its stage, whether it is put back. Asks queue/ what is left of a run."""

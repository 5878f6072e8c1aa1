"""One start of one job: signals, the work of its stage, whether it is put back. Must not know how jobs are queued."""

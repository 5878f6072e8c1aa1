"""Training: the state, the step, what rank 0 tells, the loop, and ranks that agree. Must not know jobs, schedulers or
signals: it asks `stop_requested()`."""

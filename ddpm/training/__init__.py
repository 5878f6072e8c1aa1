"""Training: the state, the step, the loop, what rank 0 writes, and agreement between ranks. Must not know jobs,
schedulers or signals: it asks `stop_requested()`."""

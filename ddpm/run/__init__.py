"""A run on disk: its paths, atomic files, events, fence, generations. Must not know networks,
and of mathematics when training is over alone."""

"""A run on disk: its paths, atomic files, events, fence, generations. Must not know mathematics or networks."""

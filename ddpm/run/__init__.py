"""A run on disk: its paths, atomic files, events, fence, generations. Must not know networks, nor mathematics beyond
the rule by which training ends."""

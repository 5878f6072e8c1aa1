"""The config: typed, frozen, from YAML and `key=value`. Must not know torch, or what a run holds."""

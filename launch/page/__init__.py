"""Runs as pages for a browser: HTML and SVG in one file, without scripts and without a network. Reads, decides nothing
about a run, and must not know the scheduler except through launch/terminal/."""

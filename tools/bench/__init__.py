"""What this project costs, and how exact it is: `python -m tools.bench`, and scripts of their own for what takes long."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]

"""What this project costs, and how exact it is: `python -m tools.bench`; what takes long has scripts of its own."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]

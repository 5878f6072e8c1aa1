"""Which networks build.py makes, by its text. Loads no torch: what is told before a run begins is known of the U-Net
alone."""

from __future__ import annotations

import ast
import pkgutil
from functools import cache


@cache
def other_than_the_unet() -> str:
    """The classes of networks that build.py makes beside the U-Net or in its place; "" where it makes none."""
    try:
        tree = ast.parse(pkgutil.get_data("ddpm.network", "build.py") or b"")
    except SyntaxError:  # which is told where it is imported
        return ""
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call) and node not in raised]
    names = [name.attr if isinstance(name, ast.Attribute) else getattr(name, "id", "") for name in calls]
    made = dict.fromkeys(name for name in names if name[:1].isupper())
    others = [name for name in made if name not in ("UNet", "Generator")]
    return " or ".join(others) or ("" if "UNet" in made else "another network")

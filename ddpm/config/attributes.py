"""Names of CelebA's attributes, by which images are selected and labelled. Must not know where images are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

HEADER = (
    "5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair "
    "Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male "
    "Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks "
    "Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace "
    "Wearing_Necktie Young"
)
"""Line 2 of CelebA's list of attributes."""
NAMES = HEADER.split()


def unknown_name(attributes: Iterable[str], label_attributes: Iterable[str], known: list[str]) -> str:
    """The message for the first attribute that is not among the `known`; "" if all are."""
    for key, names in (("attributes", attributes), ("label_attributes", label_attributes)):
        for name in names:
            if name not in known:
                by_lower = {k.lower(): k for k in known}
                near = difflib.get_close_matches(name.lower(), by_lower, 3, 0.6)
                hint = f"did you mean {' or '.join(by_lower[n] for n in near)}? " if near else ""
                return f"data.{key}: unknown attribute {name!r}; {hint}The {len(known)} are: {', '.join(known)}"
    return ""

"""Parsers of command-line values. Each reports a bad value in one sentence."""

import argparse
from collections.abc import Callable, Collection

Size = tuple[int, int]


def sizes(text: str) -> list[Size]:
    """Parse `128x10,4096x1000` as [(128, 10), (4096, 1000)]."""
    parsed = []
    for part in text.split(","):
        rows, _, classes = part.strip().lower().partition("x")
        if not (rows.isdecimal() and classes.isdecimal() and int(rows) > 0 and int(classes) > 0):
            raise argparse.ArgumentTypeError(f"{part!r} is not a size: give rows x classes, such as 128x10")
        parsed.append((int(rows), int(classes)))
    return parsed


def sizes_text(values: list[Size]) -> str:
    return ",".join(f"{rows}x{classes}" for rows, classes in values)


def names_among(known: Collection[str]) -> Callable[[str], list[str]]:
    """Return a parser of comma-separated names that accepts only the names in `known`."""

    def parse_names(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return parse_names

"""Pictures that are there twice: the same bytes, or nearly the same to the eye."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from transferkit.data.facts import Facts
from transferkit.data.hashing import find_near
from transferkit.data.report import Finding, Severity


def find_exact(facts: Sequence[Facts]) -> Iterator[Finding]:
    """Report groups of files with the same bytes."""
    groups: dict[bytes, list[Facts]] = defaultdict(list)
    for each in facts:
        if each.problem is None:
            groups[each.digest].append(each)
    for group in groups.values():
        if len(group) > 1:
            yield _describe(group, "the same file", severities=("error", "error", "warning"))


def find_similar(facts: Sequence[Facts], distance: int) -> Iterator[Finding]:
    """Report groups of pictures whose perceptual hashes, or those mirrored, are near.

    Of files with the same bytes one is looked at. A group holds everything that is near to
    one of its pictures.
    """
    seen: dict[bytes, Facts] = {}
    for each in facts:
        if each.hash is not None:
            seen.setdefault(each.digest, each)
    pictures = list(seen.values())
    upright = np.array([each.hash.upright for each in pictures if each.hash], dtype=np.uint64)
    mirrored = np.array([each.hash.mirrored for each in pictures if each.hash], dtype=np.uint64)
    pairs = np.concatenate(
        [find_near(upright, other, distance=distance) for other in (upright, mirrored)]
    )
    for group in _connect(len(pictures), pairs[pairs[:, 0] < pairs[:, 1]].tolist()):
        members = [pictures[place] for place in group]
        yield _describe(
            members, "nearly the same picture", severities=("warning", "warning", "note")
        )


def _connect(count: int, pairs: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the groups of more than one place that the pairs connect."""
    parent = list(range(count))

    def find(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for one, other in pairs:
        roots = sorted((find(one), find(other)))
        parent[roots[1]] = roots[0]
    groups: dict[int, list[int]] = defaultdict(list)
    for place in range(count):
        groups[find(place)].append(place)
    return [group for group in groups.values() if len(group) > 1]


def _describe(
    group: Sequence[Facts], what: str, *, severities: tuple[Severity, Severity, Severity]
) -> Finding:
    """Say what is wrong with a group: other labels, other splits, or only that it is there."""
    labels = sorted({each.label for each in group})
    splits = list(dict.fromkeys(each.split for each in group))
    near = "near " if what.startswith("nearly") else ""
    paths = tuple(each.path for each in group)
    if len(labels) > 1:
        message = f"{what} in the classes {', '.join(labels)}"
        return Finding(f"{near}conflict", severities[0], message, paths)
    if len(splits) > 1:
        message = f"{what} in the splits {', '.join(splits)}, a leak"
        return Finding(f"{near}leak", severities[1], message, paths)
    message = f"{what} {len(group)} times in {splits[0]}, class {labels[0]}"
    return Finding(f"{near}duplicate", severities[2], message, paths)

"""Looking at a folder of pictures before any training."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from transferkit._checks import check_integer, check_path
from transferkit.data.facts import Facts, read_facts
from transferkit.data.loader import resolve_num_workers
from transferkit.data.report import SEVERITIES, DataReport, Finding
from transferkit.data.scan import (
    DEFAULT_EXCLUDE,
    Walk,
    check_exclude,
    is_folder_there,
    natural_key,
    subfolder_names,
)
from transferkit.data.twins import find_exact, find_similar
from transferkit.errors import ConfigError, DataError
from transferkit.images import MAX_PIXELS

NEAR_DISTANCE = 8
MIN_CLASS_SIZE = 10
MAX_IMBALANCE = 10
MIN_SIDE = 32
MAX_PROPORTION = 32
ONLY_SPLIT = "all"
"""The name of the one split of a folder that holds class folders themselves."""


def check_folder(
    root: str | os.PathLike[str],
    *,
    train: str = "train",
    val: str = "val",
    test: str = "test",
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    num_workers: int | Literal["auto"] = "auto",
    max_pixels: int = MAX_PIXELS,
    near_distance: int = NEAR_DISTANCE,
    watch: Callable[[Iterable[Facts], int], Iterable[Facts]] | None = None,
) -> DataReport:
    """Look at all pictures of a folder and report what is wrong, odd or there twice.

    Every file is decoded. Folders that `load_folders` refuses are reported on, not refused.

    Args:
        root: A folder with a folder for each split, or with class folders.
        train: Name of the folder with the training pictures.
        val: Name of the folder with the validation pictures.
        test: Name of the folder with the test pictures, which may be absent.
        exclude: Glob patterns over file names that are left out.
        num_workers: Threads that read, at least 0; "auto" looks at this machine. The report
            does not depend on it.
        max_pixels: Larger pictures count as broken.
        near_distance: In how many of 64 bits the perceptual hashes of two pictures may
            differ for them to count as nearly the same, in [0, 15].
        watch: Wraps the iteration over the files, of which it is told the number, to show
            progress.

    Returns:
        The report. Nothing is written.

    Raises:
        DataError: The folder is not there, is a file, or cannot be read.
        ConfigError: A value cannot work.

    Example:
        >>> from transferkit.testing import make_image_folder
        >>> import tempfile
        >>> report = check_folder(make_image_folder(tempfile.mkdtemp(), num_train=12, num_val=10))
        >>> report.num_images, report.has_errors
        (44, False)
    """
    folder = check_path("root", root)
    near_distance = check_integer("near_distance", near_distance, minimum=0)
    if near_distance > 15:
        raise ConfigError(f"`near_distance` should be at most 15, found {near_distance}.")
    check_integer("max_pixels", max_pixels, minimum=1)
    if not is_folder_there(folder):
        problem = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"The data folder `{folder}` {problem}. Expected a folder with pictures.")
    survey = _Survey(folder, (train, val, test), check_exclude(exclude))
    count = resolve_num_workers(num_workers, num_images=len(survey.files))
    reading: Iterable[Facts] = read_facts(survey.files, num_workers=count, max_pixels=max_pixels)
    facts = list(reading if watch is None else watch(reading, len(survey.files)))
    findings = [
        *survey.findings,
        *_find_broken(facts),
        *find_exact(facts),
        *find_similar(facts, near_distance),
        *_find_odd(facts),
    ]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    good = [each for each in facts if each.problem is None]
    return DataReport(
        root=folder,
        counts=survey.counts,
        num_broken=len(facts) - len(good),
        widths=_spread([each.width for each in good]),
        heights=_spread([each.height for each in good]),
        findings=tuple(findings),
    )


def _spread(values: list[int]) -> tuple[int, ...]:
    ordered = sorted(values)
    return (ordered[0], ordered[len(ordered) // 2], ordered[-1]) if ordered else ()


class _Survey:
    """The splits, classes and files of a folder, and what is wrong with their layout."""

    def __init__(self, root: Path, names: tuple[str, str, str], exclude: tuple[str, ...]) -> None:
        self.files: list[tuple[Path, str, str]] = []
        self.counts: dict[str, dict[str, int]] = {}
        self.findings: list[Finding] = []
        self._walk = Walk(exclude)
        self._walk.enter_above(str(root))
        train, val, test = names
        found = subfolder_names(root)
        if train in found or val in found:
            self._splits(root, [train, val, *([test] if test in found else [])], found)
        else:
            self._add_split(root, ONLY_SPLIT, self._enter(root))
        self._judge_classes()

    def _splits(self, root: Path, names: Sequence[str], found: Sequence[str]) -> None:
        # The class folders of all splits before any other, as `load_folders` does.
        entered = {name: self._enter(root / name) for name in names if name in found}
        for name in names:
            if name in found:
                self._add_split(root / name, name, entered[name])
            else:
                message = f"there is no split `{name}`"
                self.findings.append(Finding("missing split", "error", message, (root / name,)))
        others = [root / name for name in found if name not in names]
        if others:
            message = "folders beside the splits are not looked at"
            self.findings.append(Finding("other folder", "note", message, tuple(others)))

    def _enter(self, folder: Path) -> dict[str, bool]:
        """Note a split's class folders; tell of each whether it is none that was noted before."""
        self._walk.enter(str(folder))
        return {name: self._walk.enter(str(folder / name)) for name in subfolder_names(folder)}

    def _add_split(self, folder: Path, split: str, entered: dict[str, bool]) -> None:
        walk = self._walk
        walk.skipped = []
        self.counts[split] = {}
        for label, is_new in entered.items():
            before = len(self.files)
            if is_new:
                for parent, names in walk.pictures(str(folder / label)):
                    self.files += [(Path(parent, name), split, label) for name in names]
            else:
                message = f"the class folder `{label}` is a link to a folder that is read already"
                self.findings.append(Finding("link", "error", message, (folder / label,)))
            self.counts[split][label] = len(self.files) - before
            if len(self.files) == before:
                message = f"the class {label!r} of {split} has no pictures"
                self.findings.append(Finding("empty class", "error", message, (folder / label,)))
        reasons = Counter(each.reason for each in walk.skipped)
        for reason, number in reasons.items():
            paths = tuple(each.path for each in walk.skipped if each.reason == reason)
            message = f"{_files(number)} of {split} left out: {reason}"
            self.findings.append(Finding("left out", "warning", message, paths))

    def _judge_classes(self) -> None:
        first, *others = self.counts
        names = set(self.counts[first])
        if len(names) < 2:
            message = f"{first} has {len(names)} classes, expected two or more"
            self.findings.append(Finding("few classes", "error", message))
        for split in others:
            for label in sorted(set(self.counts[split]) - names, key=natural_key):
                message = f"the class {label!r} is in {split} and not in {first}"
                self.findings.append(Finding("unknown class", "error", message))
            for label in sorted(names - set(self.counts[split]), key=natural_key):
                message = f"the class {label!r} is in {first} and not in {split}"
                self.findings.append(Finding("missing class", "warning", message))
        for label, number in self.counts[first].items():
            if 0 < number < MIN_CLASS_SIZE:
                message = f"the class {label!r} of {first} has {number} pictures"
                self.findings.append(Finding("tiny class", "warning", message))
        sizes = [number for number in self.counts[first].values() if number]
        if sizes and max(sizes) > MAX_IMBALANCE * min(sizes):
            message = (
                f"the largest class of {first} has {max(sizes)} pictures, the smallest "
                f'{min(sizes)}; see `balance="sampler"`'
            )
            self.findings.append(Finding("imbalance", "warning", message))


def _files(number: int) -> str:
    return f"{number} file{'s' * (number != 1)}"


def _find_broken(facts: Sequence[Facts]) -> Iterator[Finding]:
    for each in facts:
        if each.problem is not None:
            yield Finding("broken", "error", each.problem, (each.path,))


def _find_odd(facts: Sequence[Facts]) -> Iterator[Finding]:
    """Report what is read as it should be, and may yet surprise."""
    good = [each for each in facts if each.problem is None]
    wrong = [each for each in good if not each.is_named_rightly]
    if wrong:
        message = f"{_files(len(wrong))} with an extension of another format; the content decides"
        yield Finding("extension", "warning", message, tuple(each.path for each in wrong))
    odd: dict[str, list[Path]] = {}
    for each in good:
        for oddity in each.oddities(MIN_SIDE, MAX_PROPORTION):
            odd.setdefault(oddity, []).append(each.path)
    for oddity, paths in sorted(odd.items()):
        yield Finding("odd", "note", f"{_files(len(paths))} {oddity}", tuple(paths))

"""One run of a bulk prediction: what is computed, and where in the journal each picture stands."""

from __future__ import annotations

import copy
import threading
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from transferkit.errors import ConfigError, OutputError
from transferkit.inference.bulk_inputs import Input, examine
from transferkit.inference.bulk_report import BulkReport
from transferkit.inference.journal import Entry, Journal, read_engine
from transferkit.inference.network import MIN_WORTH_CHOOSING
from transferkit.inference.offsets import OffsetTable, to_key
from transferkit.inference.prediction import Failure, Prediction
from transferkit.inference.predictor import Predictor
from transferkit.inference.results import Record, to_record

JOURNAL_SUFFIX = ".journal"

_NOT_YET = -1


class BulkRun:
    """Predict pictures into a journal, and read from it what belongs into the output.

    Of a picture that is done, only its offset in the journal stays in memory. A predictor of
    another class may draw the pictures in a thread, so that all state is changed under a lock.

    Args:
        predictor: What predicts.
        out: The file that the results are for.
        total: How many pictures there are, where somebody knows.
        root: The folder that paths are relative to; None leaves them as they are.
        top_k: The classes of a row.
        resume: Go on from the journal where there is one.
        overwrite: Begin anew, whatever is there.

    Raises:
        OutputError: As for `Journal`, or `out` is there.
        ConfigError: As for `Journal`.
    """

    def __init__(
        self,
        predictor: Predictor,
        out: Path,
        *,
        total: int | None,
        root: Path | None,
        top_k: int,
        resume: bool,
        overwrite: bool,
    ) -> None:
        self.report: BulkReport = BulkReport(out)
        self._predictor = predictor
        self._root = root
        self._lock = threading.RLock()
        self._by_path = OffsetTable()
        self._by_digest = OffsetTable()
        self._places = array("q")  # For each picture in its turn the offset of its entry.
        self._waiting: deque[tuple[int, Input]] = deque()  # In the hands of the predictor.
        self._digests_waiting: set[str] = set()
        self._has_failures = False
        place = out.with_name(out.name + JOURNAL_SUFFIX)
        # Another one than the journal's might be the fastest today, and few are not worth a try.
        engine = read_engine(place) if resume else None
        if engine is None and total is not None and total <= MIN_WORTH_CHOOSING:
            engine = "pytorch"
        if engine is not None:
            # For this run alone: the next one of the caller's may have a million pictures.
            predictor = self._predictor = copy.copy(predictor)
            predictor.prefer_engine(engine)
        self.report.engine = predictor.engine_name
        settings = {
            "model": predictor.digest,
            "engine": self.report.engine,
            "precision": predictor.precision,
            "threshold": predictor.threshold,
            "temperature": predictor.temperature,
            "tta": predictor.tta,
            "top_k": top_k,
        }
        self.journal: Journal = Journal(
            place,
            settings,
            resume=resume,
            overwrite=overwrite,
            index=self._index,
        )
        if out.exists() and not overwrite and self.journal.is_empty:
            self.journal.close()
            raise OutputError(
                f"`{out}` is there already, and no journal to go on from. Give another name, or "
                f"replace it by `overwrite=True` (`--overwrite`)."
            )

    def compute(
        self, paths: Iterable[Any], bar: Any, *, with_digest: bool, options: dict[str, Any]
    ) -> None:
        """Predict all pictures that the journal does not have.

        Args:
            paths: Where the pictures are.
            bar: A progress bar.
            with_digest: Compute files with the same bytes once.
            options: For `predict_many`.

        Raises:
            OutputError: The journal cannot be written.
            ConfigError: Something is no path, or not in the root.
            ImageError: A picture cannot be read, where the options say that it ends the run.
        """
        inputs = examine(paths, self._find_path, with_digest=with_digest)
        with closing(inputs):  # Its threads look into the journal.
            self._predict(self._feed(inputs, bar), bar, options)
        if self._has_failures:
            self._predict(self._feed_again(), None, options)

    def records(self, *, leave_out_failures: bool) -> Iterator[Record]:
        """Yield the records of all pictures in their order, and count them."""
        report = self.report
        for offset in self._places:
            entry = self.journal.read(offset)
            report.num_images += 1
            if offset < self.journal.start:
                report.num_resumed += 1
            elif entry.is_failure:
                report.num_failed += 1
            elif entry.record is None:
                report.num_duplicates += 1
            else:
                report.num_predicted += 1
            if not (entry.is_failure and leave_out_failures):
                yield {"path": self._name(entry.path), **self._record_of(entry)}

    def _index(self, offset: int, entry: Entry) -> None:
        """Note what an earlier run has done; what it could not read is tried again."""
        if entry.is_failure:
            return
        self._by_path.add(to_key(entry.path), offset)
        if entry.digest is not None and entry.record is not None:
            self._by_digest.add(to_key(entry.digest), offset)

    def _find_path(self, found: Input) -> int | None:
        """Return where the journal has a file as it is now; None where it does not."""
        with self._lock:
            for offset in self._by_path.find(to_key(found.path)):
                entry = self.journal.read(offset)
                if (entry.path, entry.size, entry.modified) != found[:3] or found.size is None:
                    continue
                original = entry if entry.record is not None else self._find_digest(entry.digest)
                # An original that failed in this run answers nothing: its error names itself.
                if original is not None and not original.is_failure:
                    return offset
            return None

    def _find_digest(self, digest: str | None) -> Entry | None:
        """Return the entry with the record for a digest; None where there is none yet."""
        if digest is None:
            return None
        for offset in self._by_digest.find(to_key(digest)):
            entry = self.journal.read(offset)
            if entry.digest == digest:
                return entry
        return None

    def _feed(self, inputs: Iterable[Input], bar: Any) -> Iterator[str]:
        """Yield the paths that are to be predicted, and see to the others."""
        for each in inputs:
            self._name(each.path)
            with self._lock:
                offset = self._settle(each)
                if offset is None:
                    self._waiting.append((len(self._places), each))
                    if each.digest is not None:
                        self._digests_waiting.add(each.digest)
                else:
                    bar.update()
                self._places.append(_NOT_YET if offset is None else offset)
            if offset is None:
                yield each.path

    def _settle(self, each: Input) -> int | None:
        """Return the entry of a picture that needs no computation; None if it does."""
        if each.offset is not None or each.digest is None:
            return each.offset
        if each.digest in self._digests_waiting or self._find_digest(each.digest) is not None:
            # Without a record, which may not be there yet: the digest says whose it is.
            return self.journal.append(Entry(*each[:4]))
        return None

    def _predict(self, paths: Iterator[str], bar: Any, options: dict[str, Any]) -> None:
        predictions = self._predictor.predict_many(paths, **options)
        try:
            for found in predictions:
                self._take(found)
                if bar is not None:
                    with self._lock:
                        bar.update()
        finally:
            close = getattr(predictions, "close", None)
            if close is not None:
                close()  # Its threads end now, whoever holds the error.

    def _take(self, found: Prediction | Failure) -> None:
        """Write what was found for the picture whose turn it is."""
        record = to_record(found)
        del record["path"]  # The entry has it, as it was given.
        self._has_failures |= isinstance(found, Failure)
        with self._lock:
            number, each = self._waiting.popleft()
            offset = self.journal.append(Entry(*each[:4], record=record))
            self._places[number] = offset
            if each.digest is not None:
                self._by_digest.add(to_key(each.digest), offset)
                self._digests_waiting.remove(each.digest)

    def _unanswered(self) -> Iterator[tuple[int, Entry]]:
        """Yield the duplicates of what could not be read.

        The reason may have been the file rather than its bytes, so that each is tried by itself.
        """
        for number, offset in enumerate(self._places):
            if offset >= self.journal.start:
                entry = self.journal.read(offset)
                if entry.record is None and "error" in self._record_of(entry):
                    yield number, entry

    def _feed_again(self) -> Iterator[str]:
        for number, entry in self._unanswered():
            with self._lock:
                self._waiting.append((number, Input(entry.path, entry.size, entry.modified)))
            yield entry.path

    def _record_of(self, entry: Entry) -> Record:
        if entry.record is not None:
            return entry.record
        original = self._find_digest(entry.digest)
        assert original is not None, "a duplicate without its original"
        assert original.record is not None
        return original.record

    def _name(self, path: str) -> str:
        """Return the path as it stands in the output.

        Raises:
            ConfigError: It does not lie in the root.
        """
        if self._root is None:
            return path
        try:
            return str(Path(path).relative_to(self._root))
        except ValueError:
            raise ConfigError(
                f"The picture `{path}` does not lie in `root`, `{self._root}`. Give a folder that "
                f"all of them lie in, or leave `root` out."
            ) from None

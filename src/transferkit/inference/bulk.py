"""`predict_to_file`: the pictures of a folder, however many, into a file; to be gone on with."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from transferkit._checks import check_choice, check_flag, check_integer, check_path, check_type
from transferkit._files import atomic_path, check_writable
from transferkit.errors import ConfigError
from transferkit.inference.bulk_inputs import Shard, count, find_paths, take_shard
from transferkit.inference.bulk_report import BulkReport
from transferkit.inference.bulk_run import BulkRun
from transferkit.inference.predictor import Predictor
from transferkit.inference.results import WRITERS, resolve_format


def predict_to_file(
    predictor: Predictor,
    images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    format: Literal["csv", "jsonl", "parquet"] | None = None,  # noqa: A002  what users call it
    top_k: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    on_error: Literal["record", "skip", "raise"] = "record",
    duplicates: Literal["once", "each"] = "once",
    root: str | os.PathLike[str] | None = None,
    shard: tuple[int, int] | Literal["auto"] | None = None,
    batch_size: int | Literal["auto"] = "auto",
    num_workers: int | Literal["auto"] = "auto",
    keep_journal: bool = False,
    progress: bool = False,
) -> BulkReport:
    """Predict the classes of many pictures into a file, a row for each, in their order.

    What is done stands in a journal beside the output, `<out>.journal`, from where a run that
    was stopped goes on, whatever stopped it. The output is written at the end, all or nothing,
    and the journal removed. Memory does not grow with the pictures, but for 8 bytes for each,
    54 for each distinct one, and a list of paths if you give one.

    Args:
        predictor: What predicts.
        images: A folder, whose pictures are found at any depth and sorted by path, a glob
            pattern, a picture's path, or an iterable of paths; it may be a generator.
        out: The file to write.
        format: "csv", "jsonl" or "parquet"; None takes it from the ending of `out`.
        top_k: How many of the likeliest classes a row has, at least 1.
        resume: Go on from the journal where there is one. A picture is done if its path stands
            there with the size and time of change that the file has now; what could not be
            read is tried again.
        overwrite: Begin anew, whatever journal and output are there.
        on_error: "record" writes a row with the error for a picture that cannot be read,
            "skip" none, "raise" ends the run with the error.
        duplicates: "once" computes files with the same bytes once, "each" every time, without
            reading the files for a digest.
        root: The folder that paths in the output are relative to; None writes them as given.
        shard: `(i, n)` takes every n-th picture from the i-th on, into a file with
            `-0000i-of-0000n` before its ending. "auto" takes both from `RANK` and
            `WORLD_SIZE`, which `torchrun` sets.
        batch_size: As for `Predictor.predict_many`.
        num_workers: Likewise.
        keep_journal: Keep the journal. A later run with `resume` computes only what is new.
        progress: Show a bar with rate and remaining time on standard error, where that is a
            terminal.

    Returns:
        What was done.

    Raises:
        OutputError: The output is there already, or a journal, and neither `resume` nor
            `overwrite` is set; another process writes it; it cannot be written.
        ConfigError: An argument cannot work, or the journal is of a run with another model,
            engine, precision, threshold, temperature, augmentation or `top_k`.
        DataError: The folder is missing or holds no pictures, or nothing fits the pattern.
        ImageError: A picture cannot be read, with `on_error="raise"`.
        MissingDependencyError: `format` is "parquet" and pyarrow is not installed.

    Example:
        >>> from tempfile import mkdtemp
        >>> from transferkit.models import build_model
        >>> from transferkit.testing import make_image_folder
        >>> folder = make_image_folder(mkdtemp(), num_train=3, num_val=1)
        >>> model = build_model("squeezenet1_1", 2, weights=None)
        >>> predictor = Predictor(model, class_names=["blue", "red"], device="cpu")
        >>> report = predict_to_file(predictor, folder, folder / "found.csv", root=folder)
        >>> report.num_images, (folder / "found.csv").read_text().splitlines()[0]
        (8, 'path,label,index,probability,abstains,error')
    """
    begun = time.perf_counter()
    check_type("predictor", predictor, Predictor, "a Predictor")
    check_choice("on_error", on_error, ("record", "skip", "raise"))
    check_choice("duplicates", duplicates, ("once", "each"))
    if check_flag("resume", resume) and check_flag("overwrite", overwrite):
        raise ConfigError(
            "`resume` goes on from what is there and `overwrite` begins anew. Set one of them."
        )
    check_flag("keep_journal", keep_journal)
    check_flag("progress", progress)
    top_k = check_integer("top_k", top_k, minimum=1)
    part = _resolve_shard(shard)
    target = _name_shard(check_path("out", out), part)
    write = WRITERS[resolve_format(target, format)]
    options: dict[str, Any] = {"top_k": top_k, "batch_size": batch_size, "num_workers": num_workers}
    # An empty run says what is wrong with these before a journal is touched.
    list(predictor.predict_many([], **options))
    paths = find_paths(images)
    total = count(paths, part)
    check_writable(target)
    run = BulkRun(
        predictor,
        target,
        total=total,
        root=None if root is None else check_path("root", root),
        top_k=top_k,
        resume=resume,
        overwrite=overwrite,
    )
    is_whole = False
    try:
        options["on_error"] = "raise" if on_error == "raise" else "record"
        with tqdm(total=total, unit="picture", disable=None if progress else True) as bar:
            run.compute(
                take_shard(paths, part), bar, with_digest=duplicates == "once", options=options
            )
        with atomic_path(target) as temporary:
            write(temporary, run.records(leave_out_failures=on_error == "skip"), top_k)
        is_whole = True
    finally:
        run.journal.close(remove=is_whole and not keep_journal)
    run.report.seconds = time.perf_counter() - begun
    return run.report


def _resolve_shard(shard: object) -> Shard | None:
    """Return which part of how many is to be done; None for the whole.

    Raises:
        ConfigError: There is no such part.
    """
    if shard is None:
        return None
    if shard == "auto":
        rank, total = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE"))
        return (rank, total) if total > 1 else None
    match shard:
        case (int() as rank, int() as total) if 0 <= rank < total:
            return (rank, total)
    raise ConfigError(
        f'`shard` should be "auto" or two integers `(i, n)` with i in [0, n), found {shard!r}.'
    )


def _name_shard(out: Path, shard: Shard | None) -> Path:
    if shard is None:
        return out
    return out.with_name(f"{out.stem}-{shard[0]:05d}-of-{shard[1]:05d}{out.suffix}")

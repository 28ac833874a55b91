"""Label the pictures of a folder by Ray Data: on all cores, or all machines, of a Ray cluster.

    pip install "transferkit[ray]"
    python examples/predict_with_ray.py ants-bees.safetensors pictures --out labels

The artifact and the folder have to be where each machine of the cluster finds them, such as on a
shared disk; a folder may also lie in a store that Ray reads from (`s3://...`).
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

import transferkit as tk
from transferkit.errors import missing_dependency

if TYPE_CHECKING:
    import pyarrow as pa

ENDINGS = ["jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif"]


class Predict:
    """A stage of `map_batches`: each actor loads the artifact once, and predicts its batches.

    Args:
        artifact: The artifact.
        num_cpus: The cores of an actor.
        **options: For `Predictor.load`.
    """

    def __init__(self, artifact: str, *, num_cpus: int, **options: Any) -> None:
        # Once in each actor, where neither the network nor its engine have to travel.
        self.predictor = tk.Predictor.load(artifact, **options)
        self.num_cpus = num_cpus

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return a row for each picture; one that cannot be read has its error there."""
        import pyarrow as pa

        pictures = batch["bytes"].to_pylist()
        found = self.predictor.predict_many(pictures, on_error="record", num_workers=self.num_cpus)
        rows = [
            {**each.to_dict(), "path": path}
            for path, each in zip(batch["path"].to_pylist(), found, strict=True)
        ]
        # Told, since of a batch without errors no type could be guessed from what is in it.
        schema = pa.schema(
            {
                "path": pa.string(),
                "label": pa.string(),
                "probability": pa.float64(),
                "abstains": pa.bool_(),
                "error": pa.string(),
            }
        )
        return pa.Table.from_pylist(rows, schema=schema)


def write_labels(options: argparse.Namespace) -> None:
    """Read, predict and write, a part after the other, on all machines."""
    try:
        import ray.data
    except ModuleNotFoundError as error:
        raise missing_dependency("ray", purpose="This example", extra="ray") from error
    pictures = ray.data.read_binary_files(
        options.folder, include_paths=True, file_extensions=ENDINGS
    )
    labels = pictures.map_batches(
        Predict,
        fn_constructor_args=(os.path.abspath(options.artifact),),  # noqa: PTH100  texts travel
        fn_constructor_kwargs={"num_cpus": options.num_cpus, "engine": options.engine},
        batch_format="pyarrow",
        batch_size=options.batch_size,
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
        # The first begins as soon as it has its cores: Ray would wait for all of a fixed number.
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=options.actors),
    )
    # Ray would add to what is there, and a second run give each picture a second row.
    labels.write_parquet(options.out, mode=ray.data.SaveMode.ERROR)


def main(arguments: list[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description="Label the pictures of a folder by Ray Data.")
    parser.add_argument("artifact", help="as `Trainer.save` wrote it")
    parser.add_argument("folder", help="where the pictures are, at any depth")
    parser.add_argument("--out", required=True, help="a new folder for files of Parquet")
    parser.add_argument("--actors", type=int, default=1, help="predictors at most (default: 1)")
    parser.add_argument("--num-cpus", type=int, default=1, help="cores of each (default: 1)")
    parser.add_argument("--num-gpus", type=float, default=0, help="GPUs of each (default: 0)")
    parser.add_argument("--batch-size", type=int, default=128, help="pictures of a call")
    # Not "auto": each actor would choose by itself, while the others disturb its measurements.
    parser.add_argument(
        "--engine", choices=("pytorch", "openvino", "onnxruntime"), default="pytorch"
    )
    options = parser.parse_args(arguments)
    write_labels(options)
    print(f"The labels are in {options.out}")


if __name__ == "__main__":
    main()

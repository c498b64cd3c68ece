"""Data sets in tables: Hugging Face's parquet files, and what TensorFlow Datasets has prepared."""

import functools
import importlib.util
import io
import json
import pathlib
import re
import threading
from collections.abc import Sequence

from PIL import Image

from warm_diffusion.data.images import decode
from warm_diffusion.data.source import Source, fingerprint_of_files
from warm_diffusion.runtime import storage
from warm_diffusion.runtime.console import say


def parquet(paths: Sequence[pathlib.Path]) -> Source:
    """Parquet files of Hugging Face's layout: encoded images, and perhaps a ClassLabel."""
    import pyarrow.parquet

    where = f"parquet:{paths[0]}" + (f" and {len(paths) - 1} more" if paths[1:] else "")
    # Shards of one split differ in numbers alone.
    splits = {re.sub(r"\d+", "", path.stem): path for path in paths}
    if len(splits) > 1:
        names = sorted(path.name for path in splits.values())
        raise ValueError(
            f"{where}: files of several splits, such as {' and '.join(names[:2])}; name those of "
            f"one, such as parquet:{paths[0].parent}/train-*.parquet"
        )
    try:
        opened = [pyarrow.parquet.ParquetFile(path) for path in paths]
        metadata = opened[0].schema_arrow.metadata or {}
        features = json.loads(metadata.get(b"huggingface", "{}")).get("info", {})["features"]
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{where}: not a readable parquet file ({error})") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where}: no description of its columns by Hugging Face's `datasets` in it"
        ) from error
    of_type = lambda kind: [n for n, f in features.items() if f.get("_type") == kind]  # noqa: E731
    if len(images := of_type("Image")) != 1:
        raise ValueError(f"{where}: expected one column of images, got {images} of {[*features]}")
    classes = of_type("ClassLabel")
    if len(classes) > 1 and "label" not in classes:
        say(f"data     {where}: several labels ({', '.join(classes)}): none of them is used")
    label = "label" if "label" in classes else classes[0] if len(classes) == 1 else None
    columns = [images[0], *filter(None, [label])]
    groups = [(file, n) for file in opened for n in range(file.num_row_groups)]
    sizes = [file.metadata.row_group(n).num_rows for file, n in groups]
    places = [(group, row) for group, size in enumerate(sizes) for row in range(size)]
    lock = threading.Lock()

    @functools.lru_cache(maxsize=2)  # groups of rows are read in order
    def rows(group: int):
        file, number = groups[group]
        return file.read_row_group(number, columns=columns)

    def load(index: int) -> tuple[Image.Image, int | None]:
        group, number = places[index]
        try:
            with lock:
                table = rows(group)
            row = table.slice(number, 1).to_pylist()[0]
            content = io.BytesIO(row[images[0]]["bytes"])
        except (pyarrow.ArrowException, OSError, TypeError, KeyError) as error:
            raise ValueError(f"{where}[{index}]: no image in that row ({error})") from error
        return decode(content, f"{where}[{index}]"), row[label] if label else None

    return Source(
        lambda: len(places),
        load,
        lambda index: f"{where}[{index}]",
        fingerprint_of_files(paths),
        tuple(features[label]["names"]) if label else (),
    )


def tfds(argument: str, data_dir: str, download: bool) -> Source:
    """A set of TensorFlow Datasets in array_record format, which is read without TensorFlow.

    Preparing a missing one, which `download` allows, needs TensorFlow.
    """
    import tensorflow_datasets

    where = f"tfds:{argument}"
    name, _, split = argument.partition(":")
    split = split or "train"
    options = {"data_dir": str(storage.local(data_dir, "data.data_dir")) if data_dir else None}
    try:
        builder = tensorflow_datasets.builder(name, **options, try_gcs=False)
        records = builder.as_data_source(split)
    except tensorflow_datasets.core.DatasetNotFoundError as error:
        raise ValueError(f"{where}: no data set is called {name!r}") from error
    except NotImplementedError as error:
        problem = f"{where}: not prepared in array_record format in {builder.data_dir}"
        if not download:
            raise ValueError(
                f"{problem}; set data.data_dir to where it is, or prepare it once with --download"
            ) from error
        if importlib.util.find_spec("tensorflow") is None:
            raise ValueError(
                f"{problem}, and preparing needs TensorFlow: pip install tensorflow-cpu, here or "
                "in another environment, and give the same command there once"
            ) from error
        say(f"data     {problem}: TensorFlow Datasets downloads and prepares it")
        builder = tensorflow_datasets.builder(
            name, **options, file_format="array_record", try_gcs=False
        )
        builder.download_and_prepare()
        records = builder.as_data_source(split)
    features = builder.info.features
    if "image" not in features:
        raise ValueError(f"{where}: it has no feature 'image', only {sorted(features)}")
    class_names = tuple(features["label"].names) if "label" in features else ()

    def load(index: int) -> tuple[Image.Image, int | None]:
        record = records[index]
        image = record["image"]
        label = int(record["label"]) if class_names else None
        return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image), label

    return Source(
        lambda: len(records),
        load,
        lambda index: f"{where}[{index}]",
        f"{builder.info.full_name} {split} {builder.data_dir} {len(records)}",
        class_names,
    )

"""LSUN's database (LMDB) to a zip file of images, which `--config.data.source=zip:FILE` reads.

    pip install lmdb
    python examples/lsun.py church_outdoor_train_lmdb church.zip

Images are copied as they are, without decoding them, in the order of their keys.
"""

import pathlib
import sys
import zipfile

import lmdb

# How the encoded images that LSUN and others keep begin.
ENDINGS = {b"RIFF": "webp", b"\xff\xd8\xff": "jpg", b"\x89PNG": "png"}


def convert(database: pathlib.Path, target: pathlib.Path) -> int:
    """Writes the zip file; returns the number of images.

    Raises:
      ValueError: no database there, or a value that is no image.
    """
    if not (database / "data.mdb").is_file():
        raise ValueError(f"{database}: no data.mdb in it; name the folder that holds that file")
    partial = target.with_name(target.name + ".partial")
    # Without a lock nothing is written to the database's folder.
    environment = lmdb.open(str(database), readonly=True, lock=False, readahead=False)
    count = 0
    with (
        environment,
        environment.begin() as transaction,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive,
    ):
        for key, value in transaction.cursor():
            name = key.decode("ascii", "backslashreplace")
            endings = [e for start, e in ENDINGS.items() if value.startswith(start)]
            if not endings or not name.isalnum():
                raise ValueError(f"{database}: the value of {name} is no image of LSUN's")
            archive.writestr(f"{name}.{endings[0]}", value)
            count += 1
    if not count:
        raise ValueError(f"{database}: no image in it")
    partial.replace(target)
    return count


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        print(f"{convert(*map(pathlib.Path, sys.argv[1:])):,} images in {sys.argv[2]}")
    except (ValueError, lmdb.Error, OSError) as error:
        sys.exit(f"error: {error}")

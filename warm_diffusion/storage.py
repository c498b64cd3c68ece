"""Files that appear whole or not at all, and digests of arrays."""

import hashlib
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file under another name and renames it: readers see the old one or the new one."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes a JSON file; numpy's numbers become plain, those that are not finite are refused."""
    text = json.dumps(content, indent=2, allow_nan=False, default=lambda number: number.item())
    write_bytes(path, (text + "\n").encode())


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file says.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(pathlib.Path(path).read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from error


def digest(tree: Any) -> str:
    """SHA-256 of the names, types, shapes and bytes of a tree's arrays."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(jax.device_get(leaf))
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()

"""Finds the data of the examples: in ../shared, in a given folder, or on a mirror."""

import hashlib
import os
import urllib.request
from collections.abc import Mapping
from pathlib import Path

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "pranam_optax"


def find(
    name: str, urls: Mapping[str, str], sums: Mapping[str, str], data_dir: Path | None
) -> dict[str, str]:
    """The text of files, whose sha256 is checked.

    Args:
      name: of the folder in ../shared/data, and of the one in the cache.
      urls: where each file is downloaded from if neither folder has it.
      sums: sha256 of each file.
      data_dir: the folder to read them from, in place of these two.
    """
    texts = {}
    for file, checksum in sums.items():
        if data_dir is not None:
            path = data_dir / file
        elif (SHARED / name / file).is_file():
            path = SHARED / name / file
        else:
            path = CACHE / name / file
            if not path.is_file():
                _download(urls[file], path)
        if not path.is_file():
            raise SystemExit(f"{path} is missing. {_remedy(urls)}")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != checksum:
            raise SystemExit(
                f"{path} is not the original file: its checksum differs. "
                + _remedy(urls)
            )
        texts[file] = content.decode()
    return texts


def _remedy(urls: Mapping[str, str]) -> str:
    folder = next(iter(urls.values())).rpartition("/")[0]
    return f"Put {', '.join(urls)} (from {folder}) into a folder; name it --data-dir."


def _download(url: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()
    except OSError as error:
        raise SystemExit(
            f"{url} could not be downloaded ({error}). Put the file {path.name} into a "
            "folder and name that with --data-dir."
        ) from error
    # Renamed when whole, so that a killed download leaves no broken file.
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.rename(path)

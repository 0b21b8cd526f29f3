"""Finds the data of the examples: in ../shared, in a given folder, or on a mirror."""

import hashlib
import http.client
import os
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "pranam_optax"


class Source(NamedTuple):
    """Where a file can be downloaded from (mirrors, in this order), and its sha256."""

    urls: tuple[str, ...]
    sha256: str


def find(
    name: str, sources: Mapping[str, Source], data_dir: Path | None = None
) -> dict[str, bytes]:
    """The content of files, whose checksums are verified.

    Args:
      name: of the folder in ../shared/data, and of the one in the cache.
      sources: of each file, by its name.
      data_dir: the folder to read them from; without one, ../shared, the cache or a
        download, which goes to the cache.

    Raises:
      SystemExit: if a file is missing, is not the original one or cannot be downloaded.
        The message says what to do.
    """
    return {
        file: _content(name, file, source, data_dir) for file, source in sources.items()
    }


def _content(name: str, file: str, source: Source, data_dir: Path | None) -> bytes:
    shared, cached = SHARED / name / file, CACHE / name / file
    if data_dir is None and not shared.is_file():
        if cached.is_file():
            content = cached.read_bytes()
            if _is_original(content, source):
                return content
        content = _download(file, source)
        _write(cached, content)
        return content
    path = shared if data_dir is None else data_dir / file
    if not path.is_file():
        raise SystemExit(f"{path} is missing. {_remedy(file, source)}")
    content = path.read_bytes()
    if not _is_original(content, source):
        raise SystemExit(
            f"{path} is not the original file: its checksum differs. "
            f"{_remedy(file, source)}"
        )
    return content


def _is_original(content: bytes, source: Source) -> bool:
    return hashlib.sha256(content).hexdigest() == source.sha256


def _remedy(file: str, source: Source) -> str:
    return (
        f"Download {source.urls[0]}, put it into a folder as {file}, and name that "
        "folder with --data-dir."
    )


def _download(file: str, source: Source) -> bytes:
    """From the first mirror that sends the original file."""
    failures = []
    for url in source.urls:
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content: bytes = response.read()
        except http.client.IncompleteRead as error:
            failures.append(f"{url}: cut off after {len(error.partial)} bytes")
        except (OSError, http.client.HTTPException) as error:
            failures.append(f"{url}: {error or type(error).__name__}")
        else:
            if _is_original(content, source):
                return content
            # What a network that wants a login sends in place of every file.
            page = content.lstrip()[:1] == b"<"
            sent = "a web page" if page else f"{len(content)} bytes of another checksum"
            failures.append(f"{url}: sent {sent} instead of the file")
    raise SystemExit(
        f"{file} could not be downloaded:\n  "
        + "\n  ".join(failures)
        + f"\nTry again later. Or: {_remedy(file, source)}"
    )


def _write(path: Path, content: bytes) -> None:
    """At once: other programs see the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, so that programs that run side by side do not mix their bytes.
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as temporary:
        try:
            temporary.write(content)
            temporary.close()
            os.replace(temporary.name, path)
        except BaseException:
            os.unlink(temporary.name)
            raise

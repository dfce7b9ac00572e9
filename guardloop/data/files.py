"""Which files a source names: one file, the files of a folder, of a glob, or of an `s3://` prefix, in a fixed order."""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from guardloop.core.errors import GuardLoopError

PACKINGS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
KNOWN = f"use {', '.join(KINDS)}; text files also with {', '.join(PACKINGS)}"


@dataclass(frozen=True)
class DataFile:
    """One file of a source."""

    uri: str
    """A local path, or an `s3://` address."""
    kind: str
    """json, csv or parquet."""
    packing: str | None
    """gzip, bz2, zstd, or None."""
    partitions: dict[str, str]
    """Columns that the folders' names give: `dt=2026-01-01/part.parquet`."""

    @property
    def is_remote(self) -> bool:
        """Whether it must be fetched first."""
        return self.uri.startswith("s3://")


def list_files(path: str, where: str) -> list[DataFile]:
    """The files at `path`, sorted. Hidden files and those that begin with `_`, as Spark writes, are left out.

    Raises GuardLoopError, naming `where`, if there is none, one is of no kind that is read, or the kinds differ.
    """
    remote = path.startswith("s3://")
    root, names = _remote_names(path, where) if remote else _local_names(path, where)
    if not names:
        raise GuardLoopError(f"{where}: no data file at {path}", KNOWN)
    known = [name for name in names if _kind(name)[0]]  # a folder may hold a README beside its parts
    files = [_file(root, name, where) for name in sorted(known or names)]
    kinds = {file.kind for file in files}
    if len(kinds) > 1:
        raise GuardLoopError(
            f"{where}: {path} holds files of several kinds: {', '.join(sorted(kinds))}",
            "name those of one kind by a glob, such as folder/*.parquet",
        )
    return files


def local_path(text: str, where: str) -> Path:
    """`text` as a path, with `~` spelt out."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise GuardLoopError(f"{where}: {text} names no user's home folder", "write the whole path") from None


def _local_names(text: str, where: str) -> tuple[str, list[str]]:
    """A folder, and the names of the files below it that are meant."""
    path = local_path(text, where)
    if path.is_file():
        return str(path.parent), [path.name]
    pattern = ""
    if _is_pattern(text) and not path.exists():
        root = path
        while _is_pattern(str(root)):
            root = root.parent
        path, pattern = root, str(path.relative_to(root))
    if not path.is_dir():
        raise GuardLoopError(
            f"{where}: no such file or folder: {path}", "check the path; paths are relative to where you started"
        )
    files = path.glob(pattern) if pattern else path.rglob("*")
    return str(path), _visible(file.relative_to(path).as_posix() for file in files if file.is_file())


def _remote_names(uri: str, where: str) -> tuple[str, list[str]]:
    from guardloop.core.storage import list_keys  # noqa: PLC0415  (boto3 is slow to import and rarely needed)

    root, pattern = uri.rstrip("/"), ""
    while _is_pattern(root.removeprefix("s3://")):
        root, _, last = root.rpartition("/")
        pattern = f"{last}/{pattern}".rstrip("/")
    names = list_keys(root if pattern else uri)
    if names == [""]:  # the object itself
        folder, _, name = root.rpartition("/")
        return folder, [name]
    if pattern:
        names = [name for name in names if fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")]
    if not names:
        raise GuardLoopError(f"{where}: no such object or prefix: {uri}", "check the address and the credentials")
    return root, _visible(names)


def _visible(names: Iterable[str]) -> list[str]:
    return [name for name in names if not any(part.startswith(("_", ".")) for part in name.split("/"))]


def _file(folder: str, name: str, where: str) -> DataFile:
    uri = f"{folder.rstrip('/')}/{name}"
    kind, packing = _kind(name)
    if not kind:
        raise GuardLoopError(f"{where}: {uri} is not a kind of file that is read", KNOWN)
    partitions = dict(part.split("=", 1) for part in name.split("/")[:-1] if "=" in part)
    return DataFile(uri, kind, packing, partitions)


def _kind(name: str) -> tuple[str, str | None]:
    """The file's kind, or "", and how it is packed, by its suffixes."""
    path = Path(name.lower())
    packing = PACKINGS.get(path.suffix)
    kind = KINDS.get(Path(path.stem).suffix if packing else path.suffix, "")
    return ("" if packing and kind == "parquet" else kind), packing


def _is_pattern(text: str) -> bool:
    return any(mark in text for mark in "*?[")

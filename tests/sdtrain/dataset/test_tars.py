"""Tar shards: same samples, same bytes; nothing is lost when a file is damaged."""

import os
import tarfile

import pytest
import webdataset

from sdtrain.dataset.tars import index_samples, read_samples, write_samples
from sdtrain.errors import UserError

SAMPLES = [
    ("000000003", {"txt": "ein Bär".encode(), "jpg": os.urandom(3000), "json": b"{}"}),
    ("000000001", {"moments.npy": os.urandom(512), "txt": b""}),
    ("x" * 130, {"jpg": b"long name"}),
]


def test_what_is_written_is_read_in_the_same_order(tmp_path):
    write_samples(tmp_path / "a.tar", SAMPLES)
    assert list(read_samples(tmp_path / "a.tar")) == SAMPLES


def test_equal_samples_give_equal_bytes_whatever_the_order_of_members_and_the_time(tmp_path):
    write_samples(tmp_path / "a.tar", SAMPLES)
    write_samples(tmp_path / "b.tar", [(key, dict(reversed(parts.items()))) for key, parts in SAMPLES])
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_offsets_point_at_the_bytes(tmp_path):
    path = tmp_path / "a.tar"
    written = write_samples(path, SAMPLES)
    assert index_samples(path) == written
    content = path.read_bytes()
    for (key, parts), sample in zip(SAMPLES, written, strict=True):
        assert sample.key == key
        for extension, member in sample.members.items():
            assert content[member.offset : member.offset + member.size] == parts[extension]


def test_headers_hold_no_time_and_no_owner(tmp_path):
    write_samples(tmp_path / "a.tar", SAMPLES)
    with tarfile.open(tmp_path / "a.tar") as tar:
        for info in tar:
            assert (info.mtime, info.uid, info.gid, info.mode, info.uname, info.gname) == (0, 0, 0, 0o644, "", "")


def test_webdataset_reads_the_same_samples(tmp_path):
    write_samples(tmp_path / "a.tar", SAMPLES)
    read = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [(s["__key__"], s["jpg"] if "jpg" in s else s["moments.npy"]) for s in read] == [
        (key, parts.get("jpg") or parts["moments.npy"]) for key, parts in SAMPLES
    ]


@pytest.mark.parametrize("keep_bytes", [512, 1024, 2000, 5120, 5632])
def test_a_tar_cut_anywhere_is_refused_by_name(tmp_path, keep_bytes):
    path = tmp_path / "cut.tar"
    write_samples(path, SAMPLES)
    path.write_bytes(path.read_bytes()[:keep_bytes])
    for read in (lambda: list(read_samples(path)), lambda: index_samples(path)):
        with pytest.raises(UserError, match=r"cut\.tar is damaged"):
            read()


def test_a_tar_with_a_broken_header_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "broken.tar"
    index = write_samples(path, SAMPLES)
    content = bytearray(path.read_bytes())
    header = index[1].members["txt"].offset - tarfile.BLOCKSIZE
    content[header : header + 100] = b"\xff" * 100
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.tar is damaged"):
        list(read_samples(path))


def test_an_empty_tar_has_no_samples_and_a_missing_one_is_a_sentence(tmp_path):
    write_samples(tmp_path / "a.tar", [])
    assert list(read_samples(tmp_path / "a.tar")) == []
    with pytest.raises(UserError, match=r"no file .*b\.tar"):
        list(read_samples(tmp_path / "b.tar"))


def test_a_member_twice_in_one_sample_is_refused(tmp_path):
    path = tmp_path / "twice.tar"
    with tarfile.open(path, "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("1.txt"))
    with pytest.raises(UserError, match="twice"):
        index_samples(path)

"""Images of files: trees and shards that are wrong, and the program on them."""

from __future__ import annotations

import os
import shutil
import signal
import tarfile
import time
from pathlib import Path

import pytest
from image_helpers import add, damage, data_of, photographs
from train_helpers import start

from fused_preact.train import cli
from fused_preact.train.data import index, load

pytestmark = pytest.mark.usefixtures("one_thread")

# --- trees and shards that are wrong -----------------------------------------------------------------------


def test_a_missing_split_is_named_with_what_is_there(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--data imagenet needs --data-dir"):
        load("imagenet")
    with pytest.raises(FileNotFoundError, match=r"data_dir='.*nowhere': no such folder"):
        data_of(tmp_path / "nowhere")
    (folders / "val").rename(folders / "validation")
    with pytest.raises(
        FileNotFoundError, match=r"no folder train/ and no shards train-\*\.tar.*holds: train, vali"
    ):
        data_of(folders)
    assert data_of(folders, splits=("train", "validation")).num_classes == 3


@pytest.mark.parametrize(
    ("split", "said"),
    [("val", "train/china and 1 more not in val/"), ("train", "val/china and 1 more not in train/")],
)
def test_classes_that_differ_are_named(split: str, said: str, folders: Path) -> None:
    for name in ("china", "mirror"):
        shutil.rmtree(folders / split / name)
    with pytest.raises(ValueError, match=f"the class folders differ: {said}"):
        data_of(folders)


def test_an_empty_class_is_named(folders: Path) -> None:
    for path in (folders / "train" / "mirror").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(ValueError, match=r"train/mirror: a class without images; allowed are .*\.jpg"):
        data_of(folders)
    shutil.rmtree(folders / "val")
    (folders / "val").mkdir()
    with pytest.raises(ValueError, match="no class folders in val/"):
        data_of(folders)


JPEG = next(photographs("train", 1))[2]


def shard(path: Path, *members: tuple[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members:
            add(tar, name, content)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a.jpg", JPEG)], r"a has no label \(\.cls\)"),
        ([("a.cls", b"0")], "a has no image"),
        ([("a.jpg", JPEG), ("a.cls", b"cat")], "a.cls holds b'cat', expected a class number"),
        ([("a.jpg", JPEG), ("a.cls", b"-1")], "a.cls holds b'-1'"),
        ([("a.jpg", JPEG), ("a.cls", b"1" * 30)], "a.cls has 30 bytes"),
        ([("a.jpg", JPEG), ("a.jpg", JPEG), ("a.cls", b"0")], "a.jpg: a second one of its key"),
        ([("b.txt", b"")], "no images in this shard"),
    ],
)
def test_a_shard_of_something_else_is_named(
    members: list[tuple[str, bytes]], said: str, tmp_path: Path
) -> None:
    shard(tmp_path / "train-0.tar", *members)
    with pytest.raises(ValueError, match=rf"train-0\.tar: .*{said}"):
        index.read_shards([str(tmp_path / "train-0.tar")])


def test_shards_that_are_cut_packed_or_linked_are_named(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "train-0.tar"
    whole = (tree / "shards" / "train-000000.tar").read_bytes()
    fifth = index.read_shards([str(tree / "shards" / "train-000000.tar")]).offset[5]
    between = (
        int(fifth) - 3 * 512
    )  # a sample's end: the image's header, and before it the label and its header
    for size in (0, 100, 512, 5000, between, len(whole) // 2, len(whole) - 10_240):
        path.write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=rf"train-0\.tar: truncated, damaged or no plain tar file, {size} b"
        ):
            index.read_shards([str(path)])
    shard(path, ("a.jpg", JPEG), ("a.cls", b"0"), mode="w:gz")
    with pytest.raises(ValueError, match="no plain tar file"):
        index.read_shards([str(path)])
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        add(tar, "a.cls", b"0")
    with pytest.raises(ValueError, match=r"a\.jpg is a link or no plain file"):
        index.read_shards([str(path)])


def test_names_that_leave_the_folder_do_no_harm(tmp_path: Path) -> None:
    """Nothing is unpacked: a member's name is only a key."""
    shard(
        tmp_path / "train-0.tar",
        ("../../evil.jpg", JPEG),
        ("../../evil.cls", b"0"),
        ("/abs.jpg", JPEG),
        ("/abs.cls", b"1"),
    )
    shards = index.read_shards([str(tmp_path / "train-0.tar")])
    assert [shards.read(0), shards.read(1)] == [JPEG, JPEG]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-0.tar"]


def test_class_names_beside_shards_must_be_enough(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree / "shards", tmp_path / "data")
    (tmp_path / "data" / "classnames.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"classnames\.txt: 2 names, but class 2 is in the shards"):
        data_of(tmp_path / "data")
    (tmp_path / "data" / "classnames.txt").unlink()
    assert data_of(tmp_path / "data").class_names == ("0", "1", "2")


# --- the program -------------------------------------------------------------------------------------------

SMALL = ["--img-size", "8", "--val-img-size", "8", "--batch-size", "30", "--epochs", "2", "--device", "cpu"]


def test_the_program_trains_tests_and_resumes(
    tree: Path, tiny_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--data",
        "imagenet",
        "--data-dir",
        str(tree / "shards"),
        "--workers",
        "1",
        *SMALL,
        "--bn-images",
        "60",
    ]
    assert cli.main([*flags, "--out", str(tmp_path / "run"), "--bn-recalibrate"]) == 0
    shown = capsys.readouterr().out
    assert "preact_resnet50 on imagenet, 2 epochs of 120 images, batch 30" in shown
    assert "could not be read" not in shown
    assert (
        cli.main(["--eval", str(tmp_path / "run"), "--ten-crop", "--crop-pct", "0.5", "--workers", "0"]) == 0
    )
    assert "30 images" in capsys.readouterr().out
    assert cli.main(["--resume", str(tmp_path / "run"), "--data-dir", str(tree / "folders")]) == 0


def test_the_program_tells_of_unreadable_images(
    folders: Path, tiny_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = damage(folders)
    flags = ["--data", "imagenet", "--data-dir", str(folders), "--workers", "0", *SMALL, "--batch-size", "8"]
    assert cli.main([*flags, "--out", str(tmp_path / "run")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "could not be read" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"train: 3 images could not be read, others took their place: {paths[0]}: ")
    assert cli.main([*flags, "--out", str(tmp_path / "other"), "--on-bad-image", "error"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "--on-bad-image skip would take the next image; " in shown
    assert shown.count("\n") == 1


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_ctrl_c_in_a_terminal_is_one_line(tree: Path, tmp_path: Path) -> None:
    """It reaches the decoding processes too."""
    out = tmp_path / "run"
    flags = [
        "--recipe",
        "imagenet-resnet18-torch",
        "--data-dir",
        str(tree / "folders"),
        "--workers",
        "2",
        *SMALL,
    ]
    process = start(
        "-m",
        "fused_preact.train",
        *flags,
        "--plain",
        "--epochs",
        "500",
        "--out",
        str(out),
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    while not (out / "last.pt").exists():
        time.sleep(0.05)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert shown.startswith("\ninterrupted; ")
    assert shown.count("\n") == 2

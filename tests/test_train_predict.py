"""Predictions with a checkpoint's own preprocessing, and weights as safetensors files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_helpers import CLASSES, write_folders
from PIL import Image
from test_train_data import TINY, write
from train_helpers import CONFIG, start

from fused_preact import predict
from fused_preact.predict import Predictor
from fused_preact.train import checkpoint, cli, fit, weights
from fused_preact.train.config import Config
from fused_preact.train.data import DataSet, cifar, load, plain_batches
from fused_preact.train.loop import Trainer, logits_of
from fused_preact.train.recipes import RECIPES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def digits_run(data: DataSet, tiny_model: None, tmp_path: Path) -> Path:
    fit.fit(CONFIG, data, tmp_path / "run")
    return tmp_path / "run"


def pictures(images: torch.Tensor, folder: Path, white: int) -> list[str]:
    """A PNG of each image."""
    folder.mkdir()
    for number, image in enumerate(images):
        pixels = (image.permute(1, 2, 0).float() * (255 / white)).round().byte().numpy()
        Image.fromarray(pixels.squeeze()).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(len(images))]


def trained_logits(payload: dict[str, Any], data: DataSet) -> torch.Tensor:
    """What the training script's test sees, image by image."""
    config = Config.from_dict(payload["config"])
    trainer = Trainer(config, data, fused=config.fused)
    checkpoint.restore(trainer, payload)
    trainer.model.eval()
    with torch.no_grad():
        batches = [logits_of(trainer.model, images) for images, _ in plain_batches(data.test, config.recipe)]
    return torch.cat(batches)


def test_digits_are_predicted_as_in_the_test(digits_run: Path, data: DataSet, tmp_path: Path) -> None:
    expected = trained_logits(checkpoint.load(digits_run), data)
    paths = pictures(data.test.images, tmp_path / "png", white=16)
    predictor = Predictor(weights.read(digits_run))
    found = predictor.logits(torch.stack([predictor.read(path) for path in paths]))
    # 255 is no multiple of 16: a stored value is off by up to 1/32.
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert [one.labels[0] for one in predictor(paths)] == expected.argmax(1).tolist()
    (first, *_) = predictor(paths[:1], topk=99)
    assert len(first.labels) == 10
    assert sum(first.probabilities) == pytest.approx(1)
    assert first.probabilities == sorted(first.probabilities, reverse=True)


def test_averaged_weights_serve_where_there_are_some(data: DataSet, tiny_model: None, tmp_path: Path) -> None:
    fit.fit(replace(CONFIG, model_ema=True), data, tmp_path)
    payload, found = checkpoint.load(tmp_path), weights.read(tmp_path)
    for name, value in found.state.items():
        assert torch.equal(value, payload["ema"].get(name, payload["state"][name])), name
    assert not torch.equal(found.state["5.weight"], payload["state"]["5.weight"])


@pytest.mark.parametrize("recipe", ["cifar10-resnet20", "cifar10-resnet20-torch"])
def test_cifar_keeps_its_mean_image_in_a_safetensors_file(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "LAYOUTS", TINY)
    write("cifar10", "folder", tmp_path)
    data = load("cifar10", str(tmp_path))
    config = Config("cifar10", replace(RECIPES[recipe], batch_size=2), fused=False)
    payload = checkpoint.pack(Trainer(config, data, fused=False), [])
    weights.write(tmp_path / "w.safetensors", weights.of_payload(payload))
    found = weights.read(tmp_path / "w.safetensors")
    assert found.config == config
    assert found.card["class_names"][3] == "cat"
    assert torch.equal(found.card["pixel_mean"], data.train.mean_image())
    for name, value in payload["state"].items():
        assert torch.equal(found.state[name], value), name
    predictor = Predictor(found)
    paths = pictures(data.test.images, tmp_path / "png", white=255)
    logits = predictor.logits(torch.stack([predictor.read(path) for path in paths]))
    torch.testing.assert_close(logits, trained_logits(payload, data))


@pytest.mark.parametrize("ten_crop", [False, True])
def test_images_of_files_are_predicted_as_in_the_test(ten_crop: bool, tmp_path: Path) -> None:
    data = load("imagenet", str(write_folders(tmp_path / "data", train=4, val=2)))
    recipe = replace(
        RECIPES["imagenet-resnet18-torch"], img_size=32, val_img_size=32, ten_crop=ten_crop, batch_size=4
    )
    config = Config("imagenet", recipe, fused=False)
    payload = checkpoint.pack(Trainer(config, data, fused=False), [])
    predictor = Predictor(weights.of_payload(payload))
    paths = [data.test.index.name(number) for number in range(6)]
    found = predictor.logits(torch.stack([predictor.read(path) for path in paths]))
    torch.testing.assert_close(found, trained_logits(payload, data))
    assert predictor.card["class_names"] == list(CLASSES)


def test_the_program_prints_text_and_json(
    digits_run: Path, data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = pictures(data.test.images[:5], tmp_path / "png", white=16)
    assert predict.main([str(digits_run), *paths, "--topk", "2", "-b", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::3] == paths
    assert all(line.endswith(tuple("0123456789")) and " %  " in line for line in lines[1::3])
    assert predict.main([str(digits_run / "best.pt"), *paths, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["image"] for one in found] == paths
    assert [len(one["top"]) for one in found] == [5] * 5
    assert set(found[0]["top"][0]) == {"label", "class", "probability"}


def test_an_unreadable_image_is_named_and_the_others_predicted(
    digits_run: Path, data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = pictures(data.test.images[:2], tmp_path / "png", white=16)
    (tmp_path / "text.png").write_text("no image")
    flags = [str(digits_run), paths[0], str(tmp_path / "text.png"), "nowhere.png", paths[1], "--json"]
    assert predict.main(flags) == 1
    shown = capsys.readouterr()
    assert [one["image"] for one in json.loads(shown.out)] == paths
    first, second = shown.err.splitlines()
    assert first.startswith(f"error: {tmp_path / 'text.png'}: cannot be read (cannot identify image")
    assert second == "error: nowhere.png: cannot be read (nowhere.png: No such file or directory)"


def test_bad_input_is_one_line(digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged, foreign = tmp_path / "d.safetensors", tmp_path / "f.safetensors"
    weights.write(damaged, weights.read(digits_run))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(3)}, foreign)
    for flags, said in (
        ([str(tmp_path / "nowhere"), "x.png"], "nowhere"),
        ([str(damaged), "x.png"], f"{len(whole) // 2} bytes, truncated, damaged or no safetensors file"),
        ([str(foreign), "x.png"], "weights without config and data_card: not written by"),
        ([str(digits_run), "x.png", "--topk", "0"], "--topk 0: must be at least 1"),
        ([str(digits_run)], "IMAGE"),
        ([str(digits_run), "x.png", "--device", "tpu"], "tpu"),
    ):
        assert predict.main(flags) == 2
        shown = capsys.readouterr()
        assert (shown.out, shown.err[:7], shown.err.count("\n")) == ("", "error: ", 1)
        assert said in shown.err


def test_no_cut_and_no_flipped_header_bit_of_a_safetensors_file_ends_badly(
    digits_run: Path, tmp_path: Path
) -> None:
    """Refused in one line, or read with the shapes of the model; never anything else."""
    file, rng = tmp_path / "w.safetensors", np.random.default_rng(0)
    weights.write(file, weights.read(digits_run))
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    model = weights.build(weights.read(file))
    refused = 0
    for at in (*rng.integers(0, len(whole), 20), *rng.integers(0, header, 150)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged if at % 4 else damaged[:at])
        try:
            weights.load_into(model, weights.read(file).state, "file")
        except ValueError:
            refused += 1
    assert refused > 100


def test_a_file_says_what_is_in_it(digits_run: Path, tmp_path: Path) -> None:
    weights.write(tmp_path / "w.safetensors", weights.read(digits_run))
    from safetensors import safe_open

    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["model"], metadata["recipe"], metadata["format"]) == (
        "cifar_preact_resnet20",
        "digits",
        "pt",
    )
    assert json.loads(metadata["class_names"]) == list("0123456789")


def test_weights_of_another_network_name_the_first_difference(data: DataSet) -> None:
    model = Trainer(CONFIG, data, fused=True).model
    state = model.state_dict()
    name = next(iter(state))
    before = state[name].clone()
    for change, said in (
        (
            {name: torch.zeros(1, 2)},
            rf"file: {name} is torch\.float32 \[1, 2\], the model's is .*\[16, 1, 3, 3\]",
        ),
        ({"new": torch.zeros(1)}, "file: has new, which the model has not"),
    ):
        with pytest.raises(ValueError, match=said):
            weights.load_into(model, {**state, **change}, "file")
    with pytest.raises(ValueError, match=f"file: lacks {name}, which the model has"):
        weights.load_into(model, {key: value for key, value in state.items() if key != name}, "file")
    assert torch.equal(model.state_dict()[name], before)


FLAGS = ["--epochs", "1", "--limit-train", "128", "--limit-test", "50", "--device", "cpu"]


@pytest.mark.parametrize("form", ["last.pt", "safetensors"])
def test_a_run_begins_with_weights_and_leaves_them(form: str, tiny_model: None, tmp_path: Path) -> None:
    first, exported = tmp_path / "first", tmp_path / "new" / "w.safetensors"
    assert cli.main([*FLAGS, "--out", str(first), "--export", str(exported)]) == 0
    state = checkpoint.load(first)["state"]
    assert all(torch.equal(value, state[name]) for name, value in weights.read(exported).state.items())
    source = first if form == "last.pt" else exported
    flags = [*FLAGS, "--initial-checkpoint", str(source), "--lr", "0", "--out", str(tmp_path / "second")]
    assert cli.main(flags) == 0
    again = checkpoint.load(tmp_path / "second")["state"]
    same = [name for name, value in state.items() if torch.equal(again[name], value)]
    assert set(state) - set(same) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert (
        cli.main(["--eval", str(first), "--export", str(tmp_path / "again.safetensors"), "--device", "cpu"])
        == 0
    )
    one, other = weights.read(tmp_path / "again.safetensors"), weights.read(exported)
    assert one.config == other.config
    assert all(torch.equal(value, other.state[name]) for name, value in one.state.items())


def test_flags_about_weights_are_checked_before_training(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "w.safetensors"
    found = weights.read(digits_run)
    weights.write(file, replace(found, state={**found.state, "5.weight": torch.zeros(9, 36)}))
    for flags, said in (
        (["--initial-checkpoint", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (
            ["--initial-checkpoint", str(file)],
            "5.weight is torch.float32 [9, 36], the model's is torch.float32 [10, 36]",
        ),
        (
            ["--initial-checkpoint", str(digits_run), "--resume", str(digits_run)],
            "--initial-checkpoint begins a run",
        ),
        (["--export", str(tmp_path / "w.pt")], "w.pt: must end in .safetensors"),
        (["--export", str(file / "w.safetensors")], "w.safetensors"),
        (["--bn-images", "1"], "bn_images=1: must be at least 2"),
    ):
        out = [] if "--resume" in flags else ["--out", str(tmp_path / "out")]
        assert cli.main([*flags, *out, "--device", "cpu"]) == 2, flags
        shown = capsys.readouterr()
        assert (shown.out, shown.err[:7], shown.err.count("\n")) == ("", "error: ", 1)
        assert said in shown.err
    assert not (tmp_path / "out").exists()


def test_the_program_as_a_process(tmp_path: Path) -> None:
    process = start("-m", "fused_preact.predict", str(tmp_path / "nowhere"), "x.png")
    out, shown = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert shown.startswith("error: checkpoint '")

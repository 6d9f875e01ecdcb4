"""The paper's networks: parameter counts, fused beside plain, memory kept for backward, learning."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_preact import models

# Exact counts of the paper's networks for (model, classes), shortcut option where there is a choice.
COUNTS = [
    ("cifar_preact_resnet20", 10, {"shortcut": "A"}, 269_722),
    ("cifar_preact_resnet20", 100, {"shortcut": "A"}, 275_572),
    ("cifar_preact_resnet20", 10, {"shortcut": "B"}, 272_282),
    ("cifar_preact_resnet20", 100, {"shortcut": "B"}, 278_132),
    ("cifar_preact_resnet56", 10, {"shortcut": "A"}, 853_018),
    ("cifar_preact_resnet56", 100, {"shortcut": "A"}, 858_868),
    ("cifar_preact_resnet56", 10, {"shortcut": "B"}, 855_578),
    ("cifar_preact_resnet56", 100, {"shortcut": "B"}, 861_428),
    ("cifar_preact_resnet110", 10, {}, 1_727_962),
    ("cifar_preact_resnet110", 100, {}, 1_733_812),
    ("cifar_preact_resnet110", 10, {"shortcut": "B"}, 1_730_522),
    ("cifar_preact_resnet110", 100, {"shortcut": "B"}, 1_736_372),
    ("cifar_preact_resnet164", 10, {}, 1_703_258),
    ("cifar_preact_resnet164", 100, {}, 1_726_388),
    ("cifar_preact_resnet164", 10, {"stride_on_1x1": False}, 1_703_258),
    ("cifar_preact_resnet1001", 10, {}, 10_327_706),
    ("cifar_preact_resnet1001", 100, {}, 10_350_836),
    ("preact_resnet18", 1000, {}, 11_687_720),
    ("preact_resnet34", 1000, {}, 21_795_880),
    ("preact_resnet50", 1000, {}, 25_549_352),
    ("preact_resnet50", 1000, {"stride_on_1x1": True}, 25_549_352),
    ("preact_resnet101", 1000, {}, 44_541_480),
    ("preact_resnet152", 1000, {}, 60_185_128),
    ("preact_resnet200", 1000, {}, 64_666_152),
]
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize(("name", "classes", "options", "count"), COUNTS)
def test_parameter_count(name: str, classes: int, options: dict[str, object], count: int) -> None:
    with torch.device("meta"):
        model = getattr(models, name)(num_classes=classes, **options)
    assert sum(p.numel() for p in model.parameters()) == count


def strides(model: nn.Module) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(kernel, stride) of every strided convolution inside the stages."""
    convs = [m for m in model.stages.modules() if isinstance(m, nn.Conv2d)]
    return [(m.kernel_size, m.stride) for m in convs if m.stride != (1, 1)]


def test_stride_place() -> None:
    """On the first 1x1 (and the projection) in the CIFAR bottlenecks, on the 3x3 in the ImageNet ones."""
    with torch.device("meta"):
        cifar, imagenet = models.cifar_preact_resnet164(), models.preact_resnet50()
    assert strides(cifar) == [((1, 1), (2, 2))] * 4
    assert strides(imagenet) == [((3, 3), (2, 2)), ((1, 1), (2, 2))] * 3


@pytest.mark.parametrize(
    "name", ["cifar_preact_resnet20", "cifar_preact_resnet164", "preact_resnet18", "preact_resnet50"]
)
def test_state_dicts_are_the_same(name: str) -> None:
    fused, plain = (models.create(name, num_classes=10, fused=f) for f in (True, False))
    plain.load_state_dict(fused.state_dict(), strict=True)
    fused.load_state_dict(plain.state_dict(), strict=True)
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in plain.named_parameters()]


def pair(name: str, device: str, dtype: torch.dtype, **options: object) -> tuple[nn.Module, nn.Module]:
    fused = getattr(models, name)(num_classes=10, **options)
    for module in fused.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    plain = getattr(models, name)(num_classes=10, fused=False, **options)
    plain.load_state_dict(fused.state_dict())
    return fused.to(device, dtype), plain.to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("cifar_preact_resnet20", {}, 16),
        ("cifar_preact_resnet20", {"shortcut": "B"}, 16),
        ("cifar_preact_resnet164", {}, 8),
        ("preact_resnet18", {}, 64),
        ("preact_resnet50", {}, 64),
    ],
)
def test_fused_equals_plain_in_float64(
    device: str, memory_format: torch.memory_format, name: str, options: dict[str, object], size: int
) -> None:
    """Logits, gradients, running statistics in training, then logits in eval, to 1e-10."""
    fused, plain = pair(name, device, torch.float64, **options)
    x = torch.randn(2, 3, size, size, dtype=torch.float64, device=device).contiguous(
        memory_format=memory_format
    )
    target = torch.tensor([3, 7], device=device)
    for model in (fused, plain):
        F.cross_entropy(model(x), target).backward()
    for (key, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        error = (a.grad - b.grad).abs().max() / b.grad.abs().max().clamp_min(1e-12)
        assert error < 1e-10, f"{key}: relative error of the gradient {error:.1e}"
    for (key, a), b in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=key)
    for training in (True, False):
        fused.train(training)
        plain.train(training)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-10, atol=1e-10)


def saved_activation_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes kept for backward by one training step, each storage once, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(x).sum()
    total = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    return total


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "shape"), [("cifar_preact_resnet164", (4, 3, 32, 32)), ("preact_resnet50", (2, 3, 224, 224))]
)
def test_saved_activations_are_halved(device: str, name: str, shape: tuple[int, ...]) -> None:
    fused, plain = pair(name, device, torch.float32)
    x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    ours, theirs = saved_activation_bytes(fused, x), saved_activation_bytes(plain, x)
    assert ours <= 0.55 * theirs, (
        f"{ours / 2**20:.1f} MiB kept by the fused model, {theirs / 2**20:.1f} by the plain one"
    )


@pytest.mark.parametrize("part", ["stages", "stages.0", "stages.0.1", "stages.0.0.conv2", "bn"])
def test_hooks_see_their_calls(part: str) -> None:
    """Feature extraction: a hook anywhere is called with the tensors of the plain model."""
    fused, plain = pair("cifar_preact_resnet20", "cpu", torch.float64)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    seen = []
    for model in (fused, plain):
        model.get_submodule(part).register_forward_hook(lambda module, args, output: seen.append(output))
        model(x)
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-10, atol=1e-10)


def test_deepcopy_and_pickle(tmp_path) -> None:
    fused, _ = pair("cifar_preact_resnet20", "cpu", torch.float32)
    x = torch.randn(2, 3, 8, 8)
    fused.eval()
    torch.save(fused, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(copy.deepcopy(fused)(x), fused(x))
    assert torch.equal(loaded(x), fused(x))


def learning_curve(fused: bool, seed: int, images: Tensor, labels: Tensor) -> list[float]:
    """Mean loss of each epoch of a small network on the handwritten digits."""
    torch.manual_seed(100)
    model = models.cifar_preact_resnet20(in_channels=1, fused=fused)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    curve = []
    for _ in range(3):
        losses = []
        for batch in torch.randperm(len(images), generator=generator).split(64):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        curve.append(sum(losses) / len(losses))
    return curve


def test_same_learning_curve() -> None:
    """Fused and plain differ by less than two orders of the same data do."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = torch.tensor(digits.images[:640], dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target[:640])
    fused, plain, other = (
        learning_curve(f, s, images, labels) for f, s in ((True, 0), (False, 0), (False, 1))
    )
    noise = max(abs(a - b) for a, b in zip(plain, other, strict=True))
    difference = max(abs(a - b) for a, b in zip(fused, plain, strict=True))
    assert difference <= noise, f"fused {fused}, plain {plain}, plain with another order {other}"
    assert fused[-1] < 0.5 * fused[0]


def test_torch_compile_fullgraph() -> None:
    """No graph break; a second batch size recompiles once, for dynamic shapes, and a third one not at all."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    fused, plain = pair("cifar_preact_resnet20", "cpu", torch.float64)
    compiled = torch.compile(fused, fullgraph=True, backend=counter)
    for batch in (4, 4, 6, 5):
        x = torch.randn(batch, 3, 8, 8, dtype=torch.float64)
        for model in (compiled, plain):
            model.zero_grad()
            model(x).square().sum().backward()
    assert counter.frame_count <= 2
    for (name, a), b in zip(fused.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b[1].grad, rtol=1e-9, atol=1e-9, msg=name)
    for (name, a), b in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def test_dynamo_traces_the_choice_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA tensor takes through the Python above the ops, without one: no graph break there either."""
    from fused_preact import functional, ops

    def choose(x: Tensor) -> str:
        return "triton" if x.dtype != torch.float64 and ops._triton_missing() is None else "reference"

    monkeypatch.setattr(functional.ops, "serving_backend", choose)
    torch._dynamo.reset()
    model = models.cifar_preact_resnet20()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8, 8)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())

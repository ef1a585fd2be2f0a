"""Reconstruction loss: the reference against numpy, the kernels against both, forward and gradient.

Dimensions: B clips, T frames, H W pixels, M masked tokens, P values per token.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.launch import Launch
from kernels.masked_mse import cube_statistics, masked_mse, masked_mse_kernel, masked_mse_reference, normalised_targets
from tests.support.cubes import DEVICE, GEOMETRIES, assert_as_good, cut_batch, generator, random_frames, random_index

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MANY = GEOMETRIES[1:]  # one pixel has no deviation


def exact_targets(frames: Tensor, masked: Tensor, patch: int, tubelet: int) -> NDArray[np.float64]:
    """Compute VideoMAE's targets: per cube and channel, unbiased variance, 1e-6 added to the deviation."""
    cubes = cut_batch(frames, masked, patch, tubelet).astype(np.float64) / 255
    pixels = cubes.reshape(*cubes.shape[:2], -1, 3)
    normalised = (pixels - pixels.mean(2, keepdims=True)) / (pixels.std(2, ddof=1, keepdims=True) + 1e-6)
    return np.asarray(normalised.reshape(cubes.shape))


def random_prediction(masked: Tensor, patch: int, tubelet: int, seed: int = 5) -> Tensor:
    return torch.randn(*masked.shape, tubelet * patch**2 * 3, generator=generator(seed))


def assert_loss(loss: Tensor, exact: float) -> None:
    """Allow eight roundings in float32.

    The reference's own error is not a yardstick for a single number, which may be right by luck.
    """
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert loss.item() == pytest.approx(exact, rel=1e-6)


def check_kernel(
    prediction: Tensor, frames: Tensor, masked: Tensor, patch: int, tubelet: int, upstream: float = 1.0
) -> None:
    """Check that loss and gradient are as good as the reference's. All on DEVICE; the prediction keeps its strides."""
    host = [x.detach().cpu() for x in (prediction, frames, masked)]
    prediction = prediction.detach().requires_grad_()
    host[0].requires_grad_()
    loss = masked_mse_kernel(prediction, frames, masked, patch, tubelet)
    reference = masked_mse_reference(host[0], host[1], host[2], patch, tubelet)
    difference = host[0].detach().double().numpy() - exact_targets(host[1], host[2], patch, tubelet)
    assert_loss(loss, np.mean(difference**2))
    (gradient,) = torch.autograd.grad(loss, prediction, torch.tensor(upstream, device=DEVICE))
    (own,) = torch.autograd.grad(reference, host[0], torch.tensor(upstream))
    assert gradient.dtype == prediction.dtype
    assert_as_good(gradient, own, upstream * 2 / difference.size * difference)


# ---- the reference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "patch", "tubelet"), MANY)
def test_reference_equals_numpy(shape: tuple[int, ...], patch: int, tubelet: int) -> None:
    frames, masked = random_frames(shape), random_index(shape, patch, tubelet)
    targets = exact_targets(frames, masked, patch, tubelet)
    prediction = torch.randn(targets.shape, dtype=torch.float64, generator=generator(5))
    expected = np.mean((prediction.numpy() - targets) ** 2)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        loss = masked_mse(prediction.to(dtype), frames, masked, patch, tubelet)
        assert (loss.dtype, loss.dim()) == (dtype, 0)
        assert loss.item() == pytest.approx(expected, rel=tolerance)
    got = normalised_targets(frames, masked, patch, tubelet, torch.float64)
    assert np.abs(got.numpy() - targets).max() < 1e-10


def test_bfloat16_is_computed_in_float32() -> None:
    shape, patch, tubelet = GEOMETRIES[3]
    frames, masked = random_frames(shape), random_index(shape, patch, tubelet)
    targets = exact_targets(frames, masked, patch, tubelet)
    prediction = torch.randn(targets.shape, generator=generator(6)).bfloat16()
    loss = masked_mse(prediction, frames, masked, patch, tubelet)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(np.mean((prediction.double().numpy() - targets) ** 2), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "patch", "tubelet"), MANY[:3])
def test_reference_gradient(shape: tuple[int, ...], patch: int, tubelet: int) -> None:
    frames, masked = random_frames(shape), random_index(shape, patch, tubelet)[:, :2]
    prediction = random_prediction(masked, patch, tubelet).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: masked_mse(p, frames, masked, patch, tubelet), prediction)


def test_predicting_zero_costs_about_one() -> None:
    shape, patch, tubelet = GEOMETRIES[-1]
    frames, masked = random_frames(shape), random_index(shape, patch, tubelet)
    loss = masked_mse(torch.zeros(*masked.shape, tubelet * patch**2 * 3), frames, masked, patch, tubelet)
    assert loss.item() == pytest.approx(1 - 1 / (tubelet * patch**2), rel=1e-4)  # unbiased: (n - 1) / n


@pytest.mark.parametrize("value", [0, 1, 127, 255])
def test_flat_cubes_give_finite_values(value: int) -> None:
    frames = torch.full((1, 2, 32, 32, 3), value, dtype=torch.uint8)
    masked = torch.tensor([[0, 2, 3]], dtype=torch.int32)
    targets = normalised_targets(frames, masked, 16, 2, torch.float32)
    assert targets.isfinite().all()
    assert targets.abs().max() < 1  # flat: what remains is rounding over 1e-6
    prediction = torch.zeros(targets.shape, requires_grad=True)
    loss = masked_mse(prediction, frames, masked, 16, 2)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_statistics_are_by_channel() -> None:
    cubes = torch.tensor([[0.0, 0.5, 1.0, 1.0, 0.5, 0.0]], dtype=torch.float64)  # two pixels
    mean, deviation = cube_statistics(cubes)
    assert mean.tolist() == [[[0.5, 0.5, 0.5]]]
    assert deviation[0, 0].tolist() == pytest.approx([0.5**0.5 + 1e-6, 1e-6, 0.5**0.5 + 1e-6], rel=1e-12)


def test_another_shape_is_refused() -> None:
    frames, masked = random_frames((1, 2, 4, 4)), torch.tensor([[0, 1]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"expected a prediction \[1, 2, 24\], got \[1, 3, 24\]"):
        masked_mse(torch.zeros(1, 3, 24), frames, masked, 2, 2)
    with pytest.raises(ValueError, match="multiple of tubelet 2 and H and W of patch 3"):
        masked_mse(torch.zeros(1, 2, 54), frames, masked, 3, 2)


# ---- the kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "patch", "tubelet"), MANY)
def test_kernel_equals_numpy(shape: tuple[int, ...], patch: int, tubelet: int, dtype: torch.dtype) -> None:
    frames, masked = random_frames(shape), random_index(shape, patch, tubelet)
    prediction = random_prediction(masked, patch, tubelet).to(dtype)
    # As large as a loss scale: otherwise float16 would round the gradients to multiples of 6e-8.
    check_kernel(prediction.to(DEVICE), frames.to(DEVICE), masked.to(DEVICE), patch, tubelet, upstream=1024.0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_kernel_equals_numpy_for_any_geometry(seed: int) -> None:
    """Property: random sizes, tokens in random order with repeats, cubes of very different contrast."""
    rng = np.random.default_rng(seed)
    patch, tubelet = int(rng.integers(2, 20)), int(rng.integers(1, 4))
    slots, rows, columns = (int(x) for x in rng.integers(1, 5, 3))
    shape = (int(rng.integers(1, 4)), slots * tubelet, rows * patch, columns * patch)
    masked = torch.from_numpy(rng.integers(0, slots * rows * columns, (shape[0], 4), np.int32))
    span = 2 ** rng.integers(0, 8)
    frames = (random_frames(shape, seed) // int(256 // span)) + int(rng.integers(0, 257 - span))
    prediction = random_prediction(masked, patch, tubelet, seed).to(DTYPES[seed % 3]) * 3
    check_kernel(prediction.to(DEVICE), frames.to(DEVICE), masked.to(DEVICE), patch, tubelet, upstream=-7.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("forward", "backward"),
    [(Launch(512, 4), Launch(512, 1)), (Launch(1024, 8), Launch(16, 2)), (Launch(512, 1), Launch(4096, 8))],
)
def test_how_the_kernels_are_launched_changes_nothing(forward: Launch, backward: Launch) -> None:
    """On a GPU the order of sums may differ."""
    frames, masked = random_frames((1, 4, 32, 32)).to(DEVICE), torch.tensor([[1, 4, 7]], device=DEVICE)
    prediction = random_prediction(masked, 16, 2).to(DEVICE).requires_grad_()
    losses = [masked_mse_kernel(prediction, frames, masked, 16, 2, *launches) for launches in ((), (forward, backward))]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, prediction)[0] for loss in losses]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-9)


@pytest.mark.slow
def test_kernel_reads_views() -> None:
    whole = random_frames((2, 8, 24, 32)).to(DEVICE)
    masked = torch.tensor([[0, 3, 1], [3, 2, 0]], device=DEVICE)
    wide = torch.randn(2, 4, 800, generator=generator(8)).to(DEVICE)
    for frames in (whole[:, ::2], whole[:, :, 8:, 8:24], whole[:1].expand(2, -1, -1, -1, -1)):
        check_kernel(wide[:, 1:, 3:387], frames, masked, 8, 2)
        check_kernel(wide[:, ::2, :768:2], frames, masked[:, ::2], 8, 2)
    permuted = torch.randn(384, 3, 2, generator=generator(9)).to(DEVICE).permute(2, 1, 0)
    check_kernel(permuted, whole, masked[:1].expand(2, -1), 8, 2)


@pytest.mark.parametrize("value", [0, 1, 127, 255])
def test_kernel_of_flat_cubes_is_exact(value: int) -> None:
    frames = torch.full((1, 2, 34, 34, 3), value, dtype=torch.uint8, device=DEVICE)
    masked = torch.tensor([[0, 3]], dtype=torch.int32, device=DEVICE)
    prediction = torch.zeros(1, 2, 2 * 17**2 * 3, device=DEVICE, requires_grad=True)
    loss = masked_mse_kernel(prediction, frames, masked, 17, 2)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert loss.item() == 0
    assert not gradient.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_kernel_passes_on_what_is_not_finite(value: float) -> None:
    """The training loop rejects such a step, so the loss must show it."""
    frames, masked = random_frames((1, 2, 8, 8)).to(DEVICE), torch.tensor([[0, 3]], device=DEVICE)
    prediction = torch.zeros(1, 2, 96, device=DEVICE)
    prediction[0, 1, 95] = value
    prediction.requires_grad_()
    loss = masked_mse_kernel(prediction, frames, masked, 4, 2)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert not loss.isfinite()
    assert gradient.isfinite().sum() == gradient.numel() - 1


@pytest.mark.slow
def test_kernel_is_deterministic() -> None:
    shape, patch, tubelet = (2, 4, 32, 32), 8, 2
    frames, masked = random_frames(shape).to(DEVICE), random_index(shape, patch, tubelet).to(DEVICE)
    prediction = random_prediction(masked, patch, tubelet).to(DEVICE).requires_grad_()
    losses = [masked_mse_kernel(prediction, frames, masked, patch, tubelet) for _ in range(3)]
    gradients = [torch.autograd.grad(loss, prediction)[0] for loss in losses]
    assert losses[0] == losses[1] == losses[2]
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_kernel_under_autocast() -> None:
    """The head computes in bfloat16; the loss is scaled by a tensor, as by accumulation and gradient scalers."""
    frames, masked = random_frames((1, 2, 16, 16)).to(DEVICE), torch.tensor([[0, 2]], dtype=torch.int32, device=DEVICE)
    torch.manual_seed(0)
    head, latent = torch.nn.Linear(8, 384).to(DEVICE), torch.randn(1, 2, 8, device=DEVICE)
    results = []
    for loss_function in (masked_mse_kernel, masked_mse_reference):
        head.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            prediction = head(latent)
            assert prediction.dtype == torch.bfloat16
            loss = loss_function(prediction, frames, masked, 8, 2)
            assert loss.dtype == torch.float32
            (loss * torch.tensor(1024.0, device=DEVICE)).backward()  # type: ignore[no-untyped-call]
        assert head.weight.grad is not None
        results.append((loss.detach(), head.weight.grad.clone()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    # The interpreter truncates to bfloat16: allow one unit in the last place of each gradient value.
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0.02, atol=0.02 * float(results[1][1].abs().max()))


def test_kernel_keeps_little_for_backward() -> None:
    """It keeps its inputs and 24 bytes per token, and no targets."""
    frames, masked = random_frames((1, 2, 32, 32)).to(DEVICE), torch.tensor([[0, 3]], device=DEVICE)
    prediction = torch.zeros(1, 2, 1536, device=DEVICE, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        masked_mse_kernel(prediction, frames, masked, 16, 2)
    given = {x.untyped_storage().data_ptr() for x in (prediction, frames, masked)}
    own = [x for x in kept if x.untyped_storage().data_ptr() not in given]
    assert len(kept) == 4
    assert [x.numel() * x.element_size() for x in own] == [2 * 24]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_cuda_equals_reference(dtype: torch.dtype) -> None:
    """Targets of the whole batch, computed in float64, take the place of numpy's."""
    frames = random_frames((16, 16, 224, 224), 2)
    masked = torch.rand(16, 1568, generator=generator(3)).argsort(1)[:, :936].sort(1).values.to(torch.int32)
    prediction = random_prediction(masked, 16, 2).to(dtype).requires_grad_()
    on_cuda = prediction.detach().cuda().requires_grad_()
    upstream = torch.tensor(65536.0)
    loss = masked_mse(on_cuda, frames.cuda(), masked.cuda(), 16, 2)
    reference = masked_mse(prediction, frames, masked, 16, 2)
    (gradient,) = torch.autograd.grad(loss, on_cuda, upstream.to(loss))
    (own,) = torch.autograd.grad(reference, prediction, upstream.to(reference))
    assert loss.is_cuda
    assert gradient.is_cuda
    if dtype == torch.float64:
        torch.testing.assert_close(loss.cpu(), reference, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient.cpu(), own, rtol=0, atol=1e-12)
        return
    targets = normalised_targets(frames, masked, 16, 2, torch.float64)
    difference = (prediction.detach().double() - targets).numpy()
    assert_loss(loss, np.mean(difference**2))
    assert_as_good(gradient, own, 65536 * 2 / difference.size * difference)

"""The training step: gradients of one or several batches, then the update. train.py runs it and benchmarks time it.

Dimensions: B clips, T frames, H W pixels, V visible, M masked, P values per token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tgmae.config.run import TrainConfig
from tgmae.model.token_masks import TokenMasks
from tgmae.model.videomae import VideoMAE
from tgmae.telemetry.nvtx_ranges import named_range
from tgmae.telemetry.stage_clock import StageClock
from tgmae.training.optim import apply_gradients
from tgmae.training.parallel import World

_WARM_UP = 3  # passes before the capture, in which kernels are compiled and libraries allocate their workspaces


class TrainingStep:
    """Call `add_gradients` for one batch, or for several to accumulate, then `update`.

    clock   times the stages forward, backward and optimizer; a CUDA graph merges the first two

    Nothing here waits for the GPU. With config.cuda_graph, forward and backward of a batch are captured once and then
    replayed: the host launches one graph instead of some thousand kernels. Raises ValueError where that is impossible.
    """

    def __init__(
        self, model: VideoMAE, optimizer: torch.optim.AdamW, config: TrainConfig, world: World, use_bf16: bool
    ) -> None:
        self.model, self.optimizer, self.world, self.use_bf16 = model, optimizer, world, use_bf16
        self.clip_norm, self.accumulation = config.optim.clip_norm, config.accumulation_steps(world.size)
        self.clock = StageClock(world.device)
        self.network = DistributedDataParallel(model, broadcast_buffers=False) if world.size > 1 else model
        self.graph = None
        self.is_compiled = config.compile
        if self.is_compiled:
            model.compile_blocks()
        if config.cuda_graph:
            if world.device.type != "cuda" or world.size > 1:
                raise ValueError(
                    f"--cuda-graph needs one process on a CUDA device, got {world.size} × {world.device.type}; drop it"
                )
            self.graph = GradientGraph(self, config)

    def add_gradients(self, frames: Tensor, masks: TokenMasks, is_last: bool = True) -> tuple[Tensor, Tensor]:
        """Run forward and backward of a batch, and add its gradients, divided by the number of batches in a step.

        frames     uint8 [B, T, H, W, 3]
        is_last    whether the step ends with this batch: processes then exchange their gradients

        Returns the loss, a scalar, and the prediction [B, M, P], which a CUDA graph overwrites in the next call.
        """
        if self.graph is not None:
            with self.clock("forward and backward"):
                return self.graph.replay(frames, masks)
        if isinstance(self.network, DistributedDataParallel):
            self.network.require_backward_grad_sync = is_last
        return self.launch(frames, masks, self.clock)

    def launch(
        self, frames: Tensor, masks: TokenMasks, stage: Callable[[str], AbstractContextManager[None]]
    ) -> tuple[Tensor, Tensor]:
        """Run forward and backward kernel by kernel."""
        with stage("forward"), torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.use_bf16):
            loss, prediction = self.network(frames, masks)
        with stage("backward"):
            (loss / self.accumulation).backward()
        return loss.detach(), prediction.detach()

    @torch.no_grad()
    def evaluate(self, frames: Tensor, masks: TokenMasks) -> Tensor:
        """Return the loss of a batch, a scalar, without gradients; frames and masks as for `add_gradients`.

        No layer of the network is different in training. Compiled blocks run as they are written: each batch size would
        be compiled again.
        """
        as_written = torch.compiler.set_stance("force_eager") if self.is_compiled else nullcontext()  # imports dynamo
        with as_written, torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.use_bf16):
            loss: Tensor = self.model(frames, masks)[0]
        return loss

    def update(self, rate: float) -> Tensor:
        """Take an optimiser step with learning rate `rate`; return the norm of the gradients before clipping, a scalar.

        The norm covers the gradients of all processes, so either all of them skip a step that is not finite, or none.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.clock("optimizer"):
            norm = apply_gradients(self.model, self.optimizer, self.clip_norm)
            # A graph adds to the gradients at the addresses where it was captured.
            self.optimizer.zero_grad(set_to_none=self.graph is None)
        return norm


class GradientGraph:
    """Forward and backward of one batch size and mask ratio as a CUDA graph."""

    def __init__(self, step: TrainingStep, config: TrainConfig) -> None:
        model, device, batch = config.model, step.world.device, config.device_batch_size
        num_masked = config.mask.masked_per_slot(model.patches_per_slot) * model.num_slots
        shape = (batch, model.num_frames, model.image_size, model.image_size, 3)
        # The inputs that the graph reads. Any frames and masks will do for the capture.
        self.frames = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        tokens = torch.arange(model.num_tokens, dtype=torch.int32, device=device).expand(batch, -1)
        self.visible, self.masked = (part.contiguous() for part in tokens.tensor_split([-num_masked], dim=1))
        masks = TokenMasks(visible=self.visible, masked=self.masked)

        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                step.launch(self.frames, masks, named_range)
            step.optimizer.zero_grad(set_to_none=False)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile, but must not replay a graph (engines/cuda_graph.py).
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.loss, self.prediction = step.launch(self.frames, masks, named_range)

    def replay(self, frames: Tensor, masks: TokenMasks) -> tuple[Tensor, Tensor]:
        """Copy the inputs and replay. Raises ValueError for another shape than the captured one."""
        for given, held in ((frames, self.frames), (masks.visible, self.visible), (masks.masked, self.masked)):
            if given.shape != held.shape:
                raise ValueError(f"the captured step takes {list(held.shape)}, got {list(given.shape)}")
            held.copy_(given)
        self.graph.replay()
        return self.loss.clone(), self.prediction

"""The training step: gradients of one or several batches, then the update. train.py runs it and benchmarks time it.

Dimensions: B clips, T frames, H W pixels, V visible, M masked, P values per token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tgmae.config.run import TrainConfig
from tgmae.model.contrastive import contrast
from tgmae.model.pretraining import Inputs, Losses, Pretraining
from tgmae.model.token_masks import TokenMasks
from tgmae.telemetry.nvtx_ranges import named_range
from tgmae.telemetry.stage_clock import StageClock
from tgmae.training.optim import apply_gradients
from tgmae.training.parallel import World
from tgmae.training.sharding import exchange_gradients, shares_network

_WARM_UP = 3  # passes before the capture, in which kernels are compiled and libraries allocate their workspaces


class TrainingStep:
    """Call `add_gradients` for one batch, or for several to accumulate, then `update`.

    clock   times the stages forward, backward and optimizer; a CUDA graph merges the first two

    Nothing here waits for the GPU. With config.cuda_graph, forward and backward of a batch are captured once and then
    replayed: the host launches one graph instead of some thousand kernels. Raises ValueError where that is impossible.
    """

    def __init__(
        self, model: Pretraining, optimizer: torch.optim.AdamW, config: TrainConfig, world: World, use_bf16: bool
    ) -> None:
        self.model, self.optimizer, self.world, self.use_bf16 = model, optimizer, world, use_bf16
        self.config, self.accumulation = config.loss, config.accumulation_steps(world.size)
        self.clip_norm = config.optim.clip_norm
        self.clock = StageClock(world.device)
        self.is_sharded = shares_network(config, world)  # and then it was before its optimiser was made
        self.mae = model.mae if self.is_sharded else self._distribute(model.mae)
        self.head = None if model.head is None else self._distribute(model.head)
        self.held: list[tuple[Inputs, Tensor]] = []  # batches of this step and their features, to contrast at its end
        self.graph = None
        if config.activation_checkpointing:
            model.mae.recompute_blocks()
        self.is_compiled = config.compile
        if self.is_compiled:
            model.mae.compile_blocks()
        if config.cuda_graph:
            if world.device.type != "cuda" or world.size > 1:
                raise ValueError(
                    f"--cuda-graph needs one process on a CUDA device, got {world.size} × {world.device.type}; drop it"
                )
            if model.head is not None:
                raise ValueError("--cuda-graph cannot record the contrastive loss; drop it or --loss.contrastive")
            self.graph = GradientGraph(self, config)

    def _distribute(self, network: nn.Module) -> nn.Module:
        return DistributedDataParallel(network, broadcast_buffers=False) if self.world.size > 1 else network

    def add_gradients(self, inputs: Inputs, is_last: bool = True) -> tuple[list[Losses], Tensor | None]:
        """Run forward and backward of a batch, and add its gradients, divided by the number of batches in a step.

        is_last    whether the step ends with this batch: processes then exchange their gradients

        Returns the losses of the passes that are done with this batch, and the prediction [B, M, P] of the newest,
        which a CUDA graph overwrites in the next call. It is None where nothing is decoded, or is not yet. Where the
        whole step is contrasted, all its passes are done with the last batch.
        """
        if self.graph is not None:
            with self.clock("forward and backward"):
                losses, prediction = self.graph.replay(inputs)
            return [losses], prediction
        if self.head is not None and self.config.contrast_over == "step":
            return self._add_to_whole_step(inputs, is_last)
        self._synchronise(is_last)
        losses, prediction = self.launch(inputs, self.clock)
        return [losses], prediction

    def launch(
        self, inputs: Inputs, stage: Callable[[str], AbstractContextManager[None]]
    ) -> tuple[Losses, Tensor | None]:
        """Run forward and backward kernel by kernel."""
        with stage("forward"), self._autocast():
            made = self.mae(inputs.frames, inputs.masks, self.config.reconstruction > 0)
            contrastive, duplicates = self._contrast(made.features, inputs.text, inputs.captions)
            losses = self._weigh(made.loss, contrastive, duplicates)
            # A head that only observes learns, although its loss has no weight.
            trained = losses.total + contrastive if self.config.is_observing else losses.total
        with stage("backward"):
            torch.autograd.backward(trained / self.accumulation)
        return _detach(losses), None if made.prediction is None else made.prediction.detach()

    @torch.no_grad()
    def evaluate(self, frames: Tensor, masks: TokenMasks) -> Tensor:
        """Return the reconstruction loss of a batch, a scalar, without gradients: frames uint8 [B, T, H, W, 3].

        No layer of the network is different in training. Where processes share the network, each must call this as
        often as the others. Compiled blocks run as they are written: each batch size would be compiled again.
        """
        as_written = torch.compiler.set_stance("force_eager") if self.is_compiled else nullcontext()  # imports dynamo
        with as_written, self._autocast():
            loss: Tensor = self.model.mae(frames, masks).loss
        return loss

    def _add_to_whole_step(self, inputs: Inputs, is_last: bool) -> tuple[list[Losses], Tensor | None]:
        """Contrast the clips of a whole step by gradient caching (Gao et al. 2021, "GradCache").

        Each batch is encoded without gradients as it comes. At the end, head and loss of all features give the gradient
        with respect to each. A second pass over the batches carries it into the encoder, beside the reconstruction.
        """
        # The batch's own memory is the loader's as soon as the next one is asked for.
        inputs = inputs.clone()
        with self.clock("forward"), torch.no_grad(), self._autocast():
            self.held.append((inputs, self.model.mae(inputs.frames, inputs.masks, False).features))
        if not is_last:
            return [], None
        held, self.held = self.held, []
        with self.clock("forward"), self._autocast():
            features = torch.cat([features for _, features in held]).requires_grad_()
            text, captions = (torch.cat([getattr(one, name) for one, _ in held]) for name in ("text", "captions"))
            contrastive, duplicates = self._contrast(features, text, captions)
            weighted = contrastive if self.config.is_observing else self.config.contrastive * contrastive
        with self.clock("backward"):
            self._synchronise(True)
            torch.autograd.backward(weighted)
            gradients = features.grad.chunk(len(held)) if features.grad is not None else [None] * len(held)
        done: list[Losses] = []
        for number, ((inputs, _), gradient) in enumerate(zip(held, gradients, strict=True), 1):
            self._synchronise(number == len(held))
            with self.clock("forward"), self._autocast():
                made = self.mae(inputs.frames, inputs.masks, self.config.reconstruction > 0)
                losses = self._weigh(made.loss, contrastive.detach(), duplicates)
                trained = self.config.reconstruction * made.loss / self.accumulation
                if gradient is not None:
                    trained = trained + (made.features.float() * gradient).sum()
            with self.clock("backward"):
                torch.autograd.backward(trained)
            done.append(_detach(losses))
        return done, None if made.prediction is None else made.prediction.detach()

    def _contrast(self, features: Tensor, text: Tensor | None, captions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the contrastive loss of pooled features [B, D], and the pairs of equal captions; zeros without a head.

        A head that only observes passes no gradient to the features.
        """
        if self.head is None or self.model.head is None:
            zero = features.new_zeros((), dtype=torch.float32)
            return zero, zero
        if text is None or captions is None:
            raise ValueError("the contrastive loss needs the text of the batch")
        video = self.head(features.detach() if self.config.is_observing else features)
        with torch.autocast(features.device.type, enabled=False):
            return contrast(video, text, captions, self.model.head.log_temperature, self.config.duplicates)

    def _weigh(self, reconstruction: Tensor, contrastive: Tensor, duplicates: Tensor) -> Losses:
        total = self.config.reconstruction * reconstruction + self.config.contrastive * contrastive
        return Losses(total, reconstruction, contrastive, duplicates)

    def _synchronise(self, exchange: bool) -> None:
        """Let the backward pass of each network exchange gradients between processes, or not yet."""
        for network in (self.mae, self.head):
            if isinstance(network, DistributedDataParallel):
                network.require_backward_grad_sync = exchange
        if self.is_sharded:
            exchange_gradients(self.model.mae, exchange)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.use_bf16)

    def update(self, rate: float) -> Tensor:
        """Take an optimiser step with learning rate `rate`; return the norms of the gradients before clipping.

        The first norm is of the autoencoder, a second of the head where there is one. They cover the gradients of all
        processes, so either all of them skip a step that is not finite, or none.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.clock("optimizer"):
            norms = apply_gradients(self.model.parts(), self.optimizer, self.clip_norm)
            if self.model.head is not None:
                self.model.head.limit_temperature()
            # A graph adds to the gradients at the addresses where it was captured.
            self.optimizer.zero_grad(set_to_none=self.graph is None)
        return norms


def _detach(losses: Losses) -> Losses:
    return Losses(*(loss.detach() for loss in losses))


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
        inputs = Inputs(self.frames, TokenMasks(visible=self.visible, masked=self.masked))

        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                step.launch(inputs, named_range)
            step.optimizer.zero_grad(set_to_none=False)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile, but must not replay a graph (engines/cuda_graph.py).
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.losses, self.prediction = step.launch(inputs, named_range)

    def replay(self, inputs: Inputs) -> tuple[Losses, Tensor | None]:
        """Copy the inputs and replay. Raises ValueError for another shape than the captured one."""
        frames, masks = inputs.frames, inputs.masks
        for given, held in ((frames, self.frames), (masks.visible, self.visible), (masks.masked, self.masked)):
            if given.shape != held.shape:
                raise ValueError(f"the captured step takes {list(held.shape)}, got {list(given.shape)}")
            held.copy_(given)
        self.graph.replay()
        return Losses(*(loss.clone() for loss in self.losses)), self.prediction

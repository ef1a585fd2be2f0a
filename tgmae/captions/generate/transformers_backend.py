"""Captioning models of Hugging Face transformers on this machine.

Whatever `AutoModelForImageTextToText` loads. A processor with a chat template takes any number of frames in one prompt
(Qwen2.5-VL, SmolVLM, InternVL, LLaVA); the others take one (BLIP, BLIP-2, Florence-2). Questions without frames are
also answered by language models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dali_pipelines.video.opening import digest_file
from engines.progress import shows_bars
from tgmae.captions.generate.asking import ASK_FRAME, ASK_VIDEO, Prompt, Question, Reply

INSTALL = "pip install -c constraints.txt -e '.[captions]'"
_WINDOW = 4  # batches among which prompts are sorted, so that those of a batch are about equally long
# What models without a chat template want to be told; "" for those that begin to describe by themselves.
_PROMPTS = {"florence2": "<CAPTION>", "paligemma": "caption en\n", "kosmos-2": "<grounding>An image of"}


class ModelError(ValueError):
    """A model cannot be used for what is asked of it."""


class TransformersModel:
    """A model that is known by its configuration, and whose weights are not loaded yet.

    revision  commit on the hub, or a digest of the folder

    Raises ModelError where the package or the model is missing, or the model takes no images although it must.
    """

    def __init__(self, name: str, needs_images: bool) -> None:
        try:
            import huggingface_hub
            import transformers
        except ImportError as error:
            raise ModelError(f"--backend transformers needs the package transformers: {INSTALL}") from error
        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        # It says of every attempt that it failed, and tries six times.
        huggingface_hub.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        if not shows_bars():
            transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self.name = name
        if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
            raise ModelError(f"there is no folder {name}; --model takes a folder or a repository on the hub")
        with _explaining(name):
            self.config = transformers.AutoConfig.from_pretrained(name)
        self.takes_images = type(self.config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        if needs_images and not self.takes_images:
            raise ModelError(
                f"{name} is a {self.config.model_type}, which takes no images; --model must name one that does, such "
                "as Salesforce/blip2-opt-2.7b or Qwen/Qwen2.5-VL-3B-Instruct"
            )
        folder = Path(name)
        self.revision = _digest_folder(folder) if folder.is_dir() else str(self.config._commit_hash or "")
        with _explaining(name):
            loader = transformers.AutoProcessor if self.takes_images else transformers.AutoTokenizer
            self.processor = loader.from_pretrained(name)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        if self.takes_images and not hasattr(self.processor, "image_processor"):
            raise ModelError(f"{name} has no image processor (preprocessor_config.json); the folder is incomplete")
        self.has_chat = bool(getattr(self.processor, "chat_template", None))

    def choose_prompt(self, given: str | None, per_video: bool) -> str:
        """Return the prompt for frames. Raises ModelError where several frames are meant and the model takes one."""
        if per_video and not self.has_chat:
            raise ModelError(
                f"{self.name} ({self.config.model_type}) takes one frame in a prompt; use --captions-per frame, or a "
                "model with a chat template"
            )
        if given is not None:
            return given
        if self.has_chat:
            return ASK_VIDEO if per_video else ASK_FRAME
        return _PROMPTS.get(self.config.model_type, "")

    def load(self, device: torch.device, max_tokens: int, batch: int) -> TransformersCaptioner:
        """Load the weights: half precision on a GPU, float32 on a CPU."""
        import transformers

        kind = transformers.AutoModelForImageTextToText if self.takes_images else transformers.AutoModelForCausalLM
        dtype = torch.float32
        if device.type == "cuda":
            dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        with _explaining(self.name):
            network: Any = kind.from_pretrained(self.name, dtype=dtype)
            network = network.to(device).eval()
        return TransformersCaptioner(self, network, max_tokens, batch)


class TransformersCaptioner:
    """Answers prompts in batches, sorted by length."""

    def __init__(self, model: TransformersModel, network: Any, max_tokens: int, batch: int) -> None:
        self.model, self.network, self.max_tokens, self.batch = model, network, max_tokens, batch
        tokenizer = model.tokenizer
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"  # what is generated follows the prompt
        ends = network.generation_config.eos_token_id
        listed = ends if isinstance(ends, list) else [ends]
        self._ends = torch.tensor([end for end in (*listed, tokenizer.pad_token_id) if end is not None])

    def answer(self, questions: Iterator[Question]) -> Iterator[tuple[Question, list[Reply] | str]]:
        """Yield every question with its replies. Raises ModelError where one prompt alone is too much for the GPU."""
        waiting: list[Question] = []
        while True:
            missing = max(_WINDOW * self.batch - sum(len(question.prompts) for question in waiting), 1)
            waiting += _take(questions, missing)
            if not waiting:
                return
            waiting.sort(key=_length)
            batch = _first_batch(waiting, self.batch)
            del waiting[: len(batch)]
            replies = iter(self._reply([prompt for question in batch for prompt in question.prompts]))
            for question in batch:
                yield question, list(islice(replies, len(question.prompts)))

    def _reply(self, prompts: Sequence[Prompt]) -> list[Reply]:
        if len(prompts) > self.batch or (len(prompts) > 1 and any(prompt.seed is not None for prompt in prompts)):
            # A question may have more prompts than a batch. Answers drawn by a seed are drawn alone, so that they do
            # not depend on their neighbours.
            step = self.batch if all(prompt.seed is None for prompt in prompts) else 1
            parts = [prompts[first : first + step] for first in range(0, len(prompts), step)]
            return [reply for part in parts for reply in self._reply(part)]
        try:
            return self._generate(prompts)
        except torch.cuda.OutOfMemoryError as error:
            if len(prompts) == 1:
                raise ModelError(f"one prompt of {self.model.name} does not fit into the GPU's memory") from error
        torch.cuda.empty_cache()
        half = len(prompts) // 2
        return [*self._reply(prompts[:half]), *self._reply(prompts[half:])]

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[Prompt]) -> list[Reply]:
        inputs = self._prepare(prompts).to(self.network.device)
        for name, values in inputs.items():
            if torch.is_tensor(values) and values.is_floating_point():
                inputs[name] = values.to(self.network.dtype)
        seed = prompts[0].seed
        drawing = {"do_sample": seed is not None} | ({"temperature": 1.0} if seed is not None else {})
        if seed is not None:
            torch.manual_seed(seed)
        tokens = self.network.generate(**inputs, max_new_tokens=self.max_tokens, **drawing)
        tokens = _cut_prompt(tokens, inputs.get("input_ids"))
        texts = self.model.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        is_cut = [len(row) >= self.max_tokens and not bool(torch.isin(row[-1].cpu(), self._ends)) for row in tokens]
        if not self.model.has_chat:
            texts = [_without_prompt(text, prompt.text) for text, prompt in zip(texts, prompts, strict=True)]
        return [Reply(text.strip(), cut) for text, cut in zip(texts, is_cut, strict=True)]

    def _prepare(self, prompts: Sequence[Prompt]) -> Any:
        from PIL import Image

        images = [[Image.fromarray(frame) for frame in prompt.frames] for prompt in prompts]
        texts = [prompt.text for prompt in prompts]
        processor: Any = self.model.processor
        if self.model.has_chat:
            talks = [_talk(text, shown, self.model.takes_images) for text, shown in zip(texts, images, strict=True)]
            return processor.apply_chat_template(
                talks, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
            )
        options: dict[str, Any] = {"return_tensors": "pt"}
        if any(texts):
            options |= {"text": texts, "padding": True}
        if any(images):
            options["images"] = [shown[0] for shown in images]
        return processor(**options)


def _talk(text: str, images: Sequence[Any], takes_images: bool) -> list[dict[str, Any]]:
    """Return a conversation for a chat template. Those of language models take a plain text for their content."""
    said: Any = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    return [{"role": "user", "content": said if takes_images else text}]


def _take(questions: Iterator[Question], num_prompts: int) -> Iterator[Question]:
    while num_prompts > 0 and (question := next(questions, None)) is not None:
        num_prompts -= len(question.prompts)
        yield question


def _length(question: Question) -> tuple[int, int]:
    """Return what decides how many tokens a prompt has: pixels, then letters."""
    prompt = question.prompts[0]
    return sum(frame.size for frame in prompt.frames), len(prompt.text)


def _first_batch(waiting: Sequence[Question], size: int) -> list[Question]:
    """Return the questions at the front whose prompts fit into a batch, at least one."""
    batch = [waiting[0]]
    count = len(waiting[0].prompts)
    for question in waiting[1:]:
        count += len(question.prompts)
        if count > size:
            break
        batch.append(question)
    return batch


def _cut_prompt(tokens: Tensor, prompt: Tensor | None) -> Tensor:
    """Return what was generated. Most models give the prompt back in front of it."""
    if (
        prompt is not None
        and tokens.shape[1] >= prompt.shape[1]
        and bool((tokens[:, : prompt.shape[1]] == prompt).all())
    ):
        return tokens[:, prompt.shape[1] :]
    return tokens


def _without_prompt(text: str, prompt: str) -> str:
    """Return a text without the prompt that BLIP continues, and gives back with its own first token."""
    text = text.strip()
    return text[len(prompt) :].strip() if prompt and text.lower().startswith(prompt.lower()) else text


def _digest_folder(folder: Path) -> str:
    """Return 12 digits that tell a folder's configuration and weights from others."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
    told = "\n".join(f"{path.name} {digest_file(path)}" for path in files)
    return hashlib.sha256(told.encode()).hexdigest()[:12]


@contextmanager
def _explaining(name: str) -> Iterator[None]:
    """Turn what transformers raises for a model that it cannot load, often over several lines, into a ModelError."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        there = "" if Path(name).is_dir() else "; give a folder, or a repository that the hub lets you read"
        raise ModelError(f"transformers cannot load {name}: {reason}{there}") from error

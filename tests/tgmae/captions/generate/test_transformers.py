"""Models through their real classes: what comes out is what transformers itself makes of the same frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from tests.tgmae.captions.generate.networks import save_blip2, save_llama, save_qwen_vl
from tgmae.captions.generate import transformers_backend
from tgmae.captions.generate.asking import ASK_FRAME, ASK_VIDEO, Prompt, Question, Reply
from tgmae.captions.generate.transformers_backend import ModelError, TransformersCaptioner, TransformersModel

CPU = torch.device("cpu")
MAX_TOKENS = 8
Frame = NDArray[np.uint8]


def draw(number: int) -> Frame:
    """Stripes in a colour of their own; sizes differ, too."""
    frame = np.zeros((60 + 4 * (number % 3), 80, 3), np.uint8)
    frame[..., number % 3] = 255 - 30 * number
    frame[:: 3 + number, :, (number + 1) % 3] = 200
    return frame


FRAMES = [draw(number) for number in range(7)]


@pytest.fixture(scope="module")
def blip2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_blip2(tmp_path_factory.mktemp("models") / "blip2")


@pytest.fixture(scope="module")
def qwen_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen_vl(tmp_path_factory.mktemp("models") / "qwen_vl")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


def load(folder: Path, batch: int = 4, needs_images: bool = True) -> TransformersCaptioner:
    return TransformersModel(str(folder), needs_images).load(CPU, MAX_TOKENS, batch)


def ask(captioner: TransformersCaptioner, questions: Sequence[Question]) -> dict[int, list[Reply]]:
    found = {}
    for question, replies in captioner.answer(iter(questions)):
        assert not isinstance(replies, str)
        assert question.place not in found
        found[question.place] = replies
    return found


def one_each(text: str, frames: Sequence[Frame], at_once: int = 1) -> list[Question]:
    """Questions with `at_once` frames each, one prompt per frame."""
    groups = [frames[first : first + at_once] for first in range(0, len(frames), at_once)]
    return [
        Question(place=place, prompts=tuple(Prompt(text=text, frames=(frame,)) for frame in group))
        for place, group in enumerate(groups)
    ]


def generate(folder: Path, **inputs: object) -> torch.Tensor:
    network = AutoModelForImageTextToText.from_pretrained(folder)
    tokens = network.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
    assert isinstance(tokens, torch.Tensor)
    return tokens


def test_blip2_says_what_transformers_says(blip2: Path) -> None:
    processor = AutoProcessor.from_pretrained(blip2)
    expected = []
    for frame in FRAMES:
        pixels = processor(images=Image.fromarray(frame), return_tensors="pt")["pixel_values"]
        tokens = generate(blip2, pixel_values=pixels)
        expected.append(processor.batch_decode(tokens, skip_special_tokens=True)[0].strip())
    assert len(set(expected)) > 3  # other frames, other captions
    found = ask(load(blip2), one_each("", FRAMES, at_once=2))
    assert [reply.text for place in range(4) for reply in found[place]] == expected


@pytest.mark.parametrize("per_video", [False, True])
def test_qwen_vl_says_what_transformers_says(qwen_vl: Path, per_video: bool) -> None:
    """One frame in a prompt, or three; batches hold prompts of different lengths."""
    processor = AutoProcessor.from_pretrained(qwen_vl)
    groups = [FRAMES[:3], FRAMES[2:5], FRAMES[4:]] if per_video else [[frame] for frame in FRAMES]
    text = ASK_VIDEO if per_video else ASK_FRAME
    expected = []
    for group in groups:
        content = [*({"type": "image", "image": Image.fromarray(frame)} for frame in group)]
        talk = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
        inputs = processor.apply_chat_template(
            talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        tokens = generate(qwen_vl, **inputs)[:, inputs["input_ids"].shape[1] :]
        expected.append(processor.batch_decode(tokens, skip_special_tokens=True)[0].strip())
    assert len(set(expected)) > 2
    questions = [
        Question(place=place, prompts=(Prompt(text=text, frames=tuple(group)),)) for place, group in enumerate(groups)
    ]
    found = ask(load(qwen_vl, batch=2), questions)
    assert [found[place][0].text for place in range(len(groups))] == expected


def test_a_language_model_answers_questions_without_frames(llama: Path) -> None:
    tokenizer, network = AutoTokenizer.from_pretrained(llama), AutoModelForCausalLM.from_pretrained(llama)
    texts = ["a person opens the door", "left", "red hand over blue"]
    expected = []
    for text in texts:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = network.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        expected.append(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    questions = [Question(place=place, prompts=(Prompt(text=text),)) for place, text in enumerate(texts)]
    found = ask(load(llama, needs_images=False), questions)
    assert [found[place][0].text for place in range(3)] == expected


def test_drawn_answers_depend_on_their_seed_alone(llama: Path) -> None:
    captioner = load(llama, needs_images=False)
    prompts = tuple(Prompt(text="a door", seed=seed) for seed in range(6))
    [together] = ask(captioner, [Question(place=0, prompts=prompts)]).values()
    assert len({reply.text for reply in together}) > 2
    apart = ask(captioner, [Question(place=seed, prompts=(prompts[seed],)) for seed in (5, 2, 0)])
    assert {seed: replies[0] for seed, replies in apart.items()} == {seed: together[seed] for seed in (0, 2, 5)}


def test_answers_at_the_limit_of_tokens_are_called_cut(blip2: Path) -> None:
    [replies] = ask(load(blip2), one_each("", FRAMES[:1])).values()
    assert replies[0].is_cut


def test_a_batch_that_is_too_large_for_the_gpu_is_halved(blip2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner, sizes = load(blip2), list[int]()
    plain = captioner._generate

    def limited(prompts: Sequence[Prompt]) -> list[Reply]:
        sizes.append(len(prompts))
        if len(prompts) > room:
            raise torch.cuda.OutOfMemoryError
        return plain(prompts)

    monkeypatch.setattr(captioner, "_generate", limited)
    room = 1
    found = ask(captioner, one_each("", FRAMES[:4]))
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    room = 4
    assert found == ask(captioner, one_each("", FRAMES[:4]))
    room = 0
    with pytest.raises(ModelError, match=r"one prompt of .* does not fit into the GPU's memory"):
        ask(captioner, one_each("", FRAMES[:1]))


def test_prompts_of_a_batch_are_about_equally_long(qwen_vl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = load(qwen_vl, batch=3)
    seen: list[set[int]] = []

    def note(prompts: Sequence[Prompt]) -> list[Reply]:
        seen.append({prompt.frames[0].shape[0] for prompt in prompts})
        return [Reply("a") for _ in prompts]

    monkeypatch.setattr(captioner, "_generate", note)
    ask(captioner, one_each("a", [draw(number % 3) for number in range(9)]))
    assert seen == [{60}, {64}, {68}]


def test_models_that_do_not_fit_say_so(llama: Path, blip2: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"llama is a llama, which takes no images; --model must name one"):
        TransformersModel(str(llama), needs_images=True)
    model = TransformersModel(str(blip2), needs_images=True)
    with pytest.raises(ModelError, match=r"takes one frame in a prompt; use --captions-per frame"):
        model.choose_prompt(None, per_video=True)
    assert model.choose_prompt(None, per_video=False) == ""
    with pytest.raises(ModelError, match=r"^there is no folder .*gone; --model takes a folder or a repository"):
        TransformersModel(str(tmp_path / "gone"), needs_images=True)
    (tmp_path / "config.json").write_text('{"model_type": "eyes"}')
    with pytest.raises(ModelError, match=rf"^transformers cannot load {tmp_path}: .*eyes") as caught:
        TransformersModel(str(tmp_path), needs_images=True)
    assert "\n" not in str(caught.value)


def test_other_weights_are_another_revision(blip2: Path, tmp_path: Path) -> None:
    for path in blip2.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    revision = TransformersModel(str(blip2), True).revision
    assert TransformersModel(str(tmp_path), True).revision == revision
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert TransformersModel(str(tmp_path), True).revision != revision


def test_the_prompt_that_blip_gives_back_is_cut_off() -> None:
    assert transformers_backend._without_prompt("a photo of a cat", "A photo of") == "a cat"
    assert transformers_backend._without_prompt("a cat", "") == "a cat"

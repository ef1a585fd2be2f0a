"""The tiny CLIP: what ships, how it is trained, and how well it finds the objects of clips it never saw."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer

from engines.config import SHAPES_CLIP
from tgmae.shapes.scenes import COLORS, MOTIONS, SHAPES, clip_objects, draw_object
from tgmae.shapes.tiny_clip import MODEL, Options, encode_text, save, train
from tgmae.shapes.tiny_clip_card import describe, write_readme
from tgmae.shapes.tiny_clip_data import Picture, caption_object, draw_crops, draw_picture, make_crop_generator
from tgmae.shapes.tiny_clip_eval import TrueClip, evaluate, make_true_clips, score_patches

NAME = f"local-dir:{SHAPES_CLIP}"


@pytest.fixture(scope="module")
def offline() -> Any:
    """The shipped CLIP, with every way to the network closed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.socket.connect", lambda *_: pytest.fail("reached for the network"))
        yield open_clip.create_model(NAME).eval(), open_clip.get_tokenizer(NAME)


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return [draw_picture(index, seed=0) for index in range(40)]


@pytest.fixture(scope="module")
def true_clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[TrueClip], list[TrueClip]]:
    """Clips with one object and with two, of a seed that neither training nor the card's numbers have seen."""
    folder = tmp_path_factory.mktemp("true")
    single, double = (
        make_true_clips(folder / str(count), count=12, num_objects=count, workers=1, seed=88) for count in (1, 2)
    )
    return single, double


# What ships


def test_loads_offline_as_a_clip_of_the_usual_kind(offline: Any) -> None:
    model, tokenizer = offline
    visual = model.visual
    assert isinstance(visual, VisionTransformer)
    assert visual.pool_type == "tok"
    assert visual.attn_pool is None
    tokens = tokenizer(["a red circle moving left"])
    assert tokens.shape == (1, 77)
    assert model.token_embedding.weight.shape[0] == 49408
    with torch.inference_mode():
        text = model.encode_text(tokens, normalize=True)
        image = model.encode_image(torch.zeros(2, 3, *visual.image_size), normalize=True)
    assert text.shape == (1, MODEL["embed_dim"])
    assert image.shape == (2, MODEL["embed_dim"])


def test_the_folder_is_small_and_complete() -> None:
    assert sum(file.stat().st_size for file in SHAPES_CLIP.iterdir()) < 8e6
    config = json.loads((SHAPES_CLIP / "open_clip_config.json").read_text())
    assert config["model_cfg"] == MODEL
    assert config["preprocess_cfg"]["size"] == MODEL["vision_cfg"]["image_size"]


def test_the_card_says_how_it_was_made_and_how_well_it_does() -> None:
    card = json.loads((SHAPES_CLIP / "card.json").read_text())
    readme = (SHAPES_CLIP / "README.md").read_text()
    assert card["command"].startswith("python -m tgmae.shapes.tiny_clip --seed 0 --steps ")
    assert card["command"] in readme
    assert card["size_bytes"] == (SHAPES_CLIP / "open_clip_model.safetensors").stat().st_size
    measured = card["measured"]
    assert measured["patch_frames2"]["auc_clip"] >= 0.95
    assert measured["patch_frames2"]["masked_top"] >= 0.95
    assert min(measured["two_objects"]["first"], measured["two_objects"]["second"]) >= 0.9
    assert measured["clips"] >= 64
    for area in (measured["patch_frames1"]["auc_clip"], measured["two_objects"]["second_by_shape"]):
        assert f"{area:.3f}" in readme


def test_finds_the_objects_of_clips_it_never_saw(
    offline: Any, true_clips: tuple[list[TrueClip], list[TrueClip]]
) -> None:
    measured = evaluate(*offline, *true_clips)
    for frames in (1, 2):
        assert measured[f"patch_frames{frames}"]["auc_clip"] >= 0.95
        assert measured[f"patch_frames{frames}"]["auc_slot"] >= 0.95
        assert measured[f"patch_frames{frames}"]["masked_top"] >= 0.95
        assert measured[f"patch_frames{frames}"]["visible_bottom"] >= 0.95
    assert measured["dense_clearclip"]["auc_clip"] >= 0.85
    for name in ("first", "second", "first_in_all", "second_in_all"):
        assert measured["two_objects"][name] >= 0.9
    for wording in ("a COLOR SHAPE", "a COLOR shape", "COLOR", "a shape"):
        assert measured["auc_by_wording"][wording] >= 0.9


def test_scores_that_say_nothing_are_judged_as_chance(true_clips: tuple[list[TrueClip], list[TrueClip]]) -> None:
    """Against a judge that would praise anything: untrained weights."""
    torch.manual_seed(0)
    measured = evaluate(open_clip_untrained(), open_clip.SimpleTokenizer(), *true_clips)
    assert 0.2 < measured["patch_frames2"]["auc_clip"] < 0.8
    assert measured["truth_frames1"]["auc_clip"] > 0.97
    assert 0.2 < measured["two_objects"]["first"] < 0.8
    assert measured["patch_frames2"]["masked_top"] < 0.9


def test_scores_stand_at_their_patch(offline: Any, true_clips: tuple[list[TrueClip], list[TrueClip]]) -> None:
    """Each patch is scored by its own pixels alone: painting one over changes one score."""
    model, tokenizer = offline
    with torch.inference_mode():
        text = model.encode_text(tokenizer(["red"]), normalize=True)
    frames = true_clips[0][0].frames[:2].clone()
    before = score_patches(model, frames, text)
    frames[1, 32:48, 16:32] = torch.tensor([214, 40, 40], dtype=torch.uint8)
    changed = (score_patches(model, frames, text) - before).abs() > 1e-4
    assert before.shape == (1, 2, 36)
    assert changed.nonzero().tolist() == [[0, 1, 13]]


def open_clip_untrained() -> open_clip.CLIP:
    model = open_clip.CLIP(**MODEL).eval()
    open_clip.set_model_preprocess_cfg(
        model, {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    )
    return model


# Training


def test_training_learns_and_comes_out_the_same(pictures: list[Picture]) -> None:
    options = Options(steps=30, batch_size=128, seed=3)
    first, losses = train(options, pictures)
    assert np.mean(losses[-5:]) < np.mean(losses[:3]) - 0.3
    second, again = train(options, pictures)
    assert losses == again
    weights = second.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in first.state_dict().items())


def test_what_is_saved_is_what_was_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = open_clip_untrained()
    save(model, tmp_path)
    loaded = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    crops = torch.rand(4, 3, 24, 24)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.encode_image(crops), model.encode_image(crops), atol=0.02, rtol=0.01)
    card = describe(
        loaded, tmp_path, options=vars(Options()), loss=1.25, train_s=2, total_s=3,
        measured=json.loads((SHAPES_CLIP / "card.json").read_text())["measured"],
    )  # fmt: skip
    write_readme(tmp_path / "README.md", card)
    assert "Loss over the last 50 steps: 1.250" in (tmp_path / "README.md").read_text()
    assert str(Options().out) not in json.dumps(card)


def test_texts_without_padding_come_out_the_same(offline: Any) -> None:
    model, tokenizer = offline
    tokens = tokenizer(["red", "an orange star moving up and a blue cross spinning", "nothing but background"])
    with torch.inference_mode():
        torch.testing.assert_close(encode_text(model, tokens), model.encode_text(tokens, normalize=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 24}, "batch_size must be a multiple of 16, got 24"),
        ({"batch_size": 0}, "batch_size must be a multiple of 16, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_impossible_options(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**changes)  # type: ignore[arg-type]


# What it learns from


def test_pictures_follow_from_seed_and_number(pictures: list[Picture]) -> None:
    again, other = draw_picture(7, seed=0), draw_picture(7, seed=1)
    np.testing.assert_array_equal(again.pixels, pictures[7].pixels)
    np.testing.assert_array_equal(again.shares, pictures[7].shares)
    assert np.abs(again.pixels.astype(int) - other.pixels).mean() > 5
    assert {len(picture.objects) for picture in pictures} == {1, 2}


def test_no_data_set_shows_a_scene_of_training(pictures: list[Picture]) -> None:
    """The keys (seed, index) and (seed, index, 1) are different streams, also of the same seed and number."""
    for index, picture in enumerate(pictures):
        thing, [other] = picture.objects[0], clip_objects(0, index, 1)
        assert thing.texture != other.texture


def test_shares_are_where_the_objects_are_seen(pictures: list[Picture]) -> None:
    compared = 0
    for picture in pictures:
        for number, thing in enumerate(picture.objects):
            inside = picture.shares[number] == 255
            if thing.color in ("white", "pink") or inside.sum() < 100:
                continue
            pixels, wanted = picture.pixels[:, inside].T.astype(float), np.array(COLORS[thing.color], float)
            cosine = pixels @ wanted / (np.linalg.norm(pixels, axis=1) * np.linalg.norm(wanted))
            assert np.median(cosine) > 0.98, thing.caption
            compared += 1
    assert compared > 20


def test_crops_are_captioned_by_what_they_show() -> None:
    """On one picture of two objects: no third colour is ever named, and a crop without colour is background."""
    picture = next(p for p in (draw_picture(i, seed=4) for i in range(50)) if len(p.objects) == 2)
    crops = draw_crops(make_crop_generator(0), [picture], 30, 16, 24)
    assert crops.images.shape == (480, 3, 24, 24)
    assert crops.images.dtype == torch.float32
    named = Counter(word for caption in crops.captions for word in caption.split() if word in COLORS)
    assert set(named) == {thing.color for thing in picture.objects}
    assert min(named.values()) > 40
    saturation = crops.images.clamp(0, 1).amax(dim=1) - crops.images.clamp(0, 1).amin(dim=1)
    empty = torch.tensor([not any(word in COLORS or word in SHAPES for word in c.split()) for c in crops.captions])
    assert 50 < int(empty.sum()) < 400
    assert saturation[empty].mean() < saturation[~empty].mean()


def test_captions_vary_in_what_they_name() -> None:
    draw = np.random.default_rng(0)
    thing = draw_object(draw, "left", "orange", "star")
    captions = Counter(caption_object(draw, thing) for _ in range(2000))
    assert captions.most_common(1)[0][0] == thing.caption == "an orange star moving left"
    for wanted in ("an orange star", "the star", "star", "orange", "an orange shape", "a shape", "a star moving left"):
        assert captions[wanted] > 5, wanted
    words = {word for caption in captions for word in caption.split()}
    assert not words & ((set(COLORS) - {"orange"}) | (set(SHAPES) - {"star"}) | (set(MOTIONS) - {"left"}))

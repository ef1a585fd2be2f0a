"""The training loop on real (small) video: golden curve, resume, signals, broken data, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dali_pipelines.types import Caption
from engines.config import CLIPConfig
from tests.support.clip_models import save_small_clip
from tests.support.runs import (
    REPOSITORY,
    command,
    losses,
    run_here,
    state,
    tiny,
    validation_losses,
    wait_for_group_to_end,
    wait_for_step,
)  # fmt: skip
from tests.support.videos import write_numbered
from tgmae.captions.policy import require_captions
from tgmae.config.loss import LossConfig
from tgmae.config.masks import MaskConfig
from tgmae.config.run import TrainConfig
from tgmae.config.saved import read_config
from tgmae.data.indexing import index_folder
from tgmae.data.manifest import read_manifest, write_manifest
from tgmae.masks.maps.build_scores import build_scores
from tgmae.masks.scorer import bind_scorer, make_scorer
from tgmae.model.initial_weights import read_initial_weights
from tgmae.telemetry.metrics import read_metrics
from tgmae.train import train
from tgmae.training import parallel
from tgmae.training.checkpoints.folder import newest_checkpoint
from tgmae.training.checkpoints.read import load_checkpoint
from tgmae.training.loader import make_loader

GOLDEN = Path(__file__).with_name("golden_loss.json")


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a tiny run's time, and one test looks at what is drawn."""
    if request.node.name != "test_the_run_folder_holds_everything":
        monkeypatch.setattr("tgmae.train._draw", lambda *_: None)


def test_golden_losses(shapes: Path, tmp_path: Path) -> None:
    """Ten steps reproduce the stored curve: relative 1e-4 covers other CPUs' rounding, no change of meaning."""
    train(tiny(shapes, tmp_path))
    got = losses(tmp_path)
    if os.environ.get("TGMAE_WRITE_GOLDEN") == "1":
        GOLDEN.write_text(json.dumps(got) + "\n")
    assert got == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-4)


@pytest.mark.slow
def test_the_run_folder_holds_everything(shapes: Path, tmp_path: Path) -> None:
    """Config, metrics, TensorBoard, curve, pictures, checkpoints (the last N only), and a Hugging Face export."""
    config = tiny(shapes, tmp_path)
    result = train(replace(config, log=replace(config.log, checkpoint_every=2, keep_checkpoints=2, tensorboard=True)))
    assert (result.step, result.total_steps) == (10, 40)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["width"] == 48
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 11))
    keys = {"loss", "learning_rate", "grad_norm", "clips_per_s", "wait_share", "step_ms", "skipped_videos", "epoch"}
    assert keys <= read_metrics(tmp_path)[-1].keys()
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step_00000008.pt",
        "step_00000010.pt",
    ]
    assert [path.name for path in sorted((tmp_path / "pictures").iterdir())] == [
        "step_00000001.png",
        "step_00000005.png",
        "step_00000010.png",
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0}).Reload()
    assert [event.step for event in board.Images("pictures")] == [1, 5, 10]
    assert (tmp_path / "loss.png").stat().st_size > 1000
    from transformers import VideoMAEForPreTraining

    theirs = VideoMAEForPreTraining.from_pretrained(tmp_path / "hf").state_dict()
    ours = load_checkpoint(tmp_path / "checkpoints" / "step_00000010.pt")["model"]
    assert torch.equal(theirs["mask_token"], ours["mae.mask_token"])


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["pyav", "dali"])
def test_resume_equals_uninterrupted(shapes: Path, tmp_path: Path, pipeline: str) -> None:
    """Stopped after 7 of 10 steps, inside the second epoch, and resumed: bit for bit the same weights and losses."""
    whole = tiny(shapes, tmp_path / "whole", pipeline=pipeline)
    train(whole)
    parts = replace(whole, run_dir=tmp_path / "parts")
    train(replace(parts, max_steps=7))
    train(parts)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    one, two = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_accumulation_and_pipelines_train_alike(shapes: Path, tmp_path: Path) -> None:
    """Two half batches give the gradient of the whole one; DALI's clips give nearly the reference's losses."""
    train(tiny(shapes, tmp_path / "whole"))
    train(tiny(shapes, tmp_path / "halves", device_batch_size=2))
    train(tiny(shapes, tmp_path / "dali", pipeline="dali"))
    assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert losses(tmp_path / "dali") == pytest.approx(losses(tmp_path / "whole"), rel=1e-2)


@pytest.mark.slow
def test_bf16_trains(shapes: Path, tmp_path: Path) -> None:
    """bf16 autocast follows float32 within its precision."""
    train(tiny(shapes, tmp_path / "fp32"))
    train(tiny(shapes, tmp_path / "bf16", precision="bf16"))
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=2e-2)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")


# Masks by text


@pytest.fixture(scope="module")
def score_maps(shapes: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Score maps of the shapes clips for `by_text`, made by the tiny CLIP."""
    folder = tmp_path_factory.mktemp("scores")
    build_scores(
        read_manifest(shapes), folder, CLIPConfig(model="shapes", cache_dir=cache_dir), MaskConfig(), cells=4,
        patch_size=16, every=2, device=torch.device("cpu"), num_workers=0,
    )  # fmt: skip
    return folder


def by_text(config: TrainConfig, cache_dir: Path, **mask: object) -> TrainConfig:
    """The same run with text-guided masks by the tiny CLIP, 16 patches of 16² a slot."""
    return replace(
        config,
        model=replace(config.model, image_size=64, patch_size=16),
        mask=MaskConfig(**mask),  # type: ignore[arg-type]
        clip=CLIPConfig(model="shapes", cache_dir=cache_dir),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pipeline", "scorer", "loss"),
    [
        ("dali", "patch", LossConfig()),
        ("pyav", "cached", LossConfig(contrastive=0.5, contrast_over="step", learn_temperature=True)),
    ],
)
def test_masks_by_text_resume_equals_uninterrupted(
    shapes: Path, tmp_path: Path, cache_dir: Path, score_maps: Path, pipeline: str, scorer: str, loss: LossConfig
) -> None:
    """Text-guided from end to end; interrupted and resumed, bit for bit the same; every stage's share is reported."""
    config = tiny(shapes, tmp_path / "whole", pipeline=pipeline, max_steps=6, loss=loss, device_batch_size=2)
    whole = by_text(config, cache_dir, scorer=scorer, scores=score_maps)
    train(whole)
    parts = replace(whole, run_dir=tmp_path / "parts")
    train(replace(parts, max_steps=4))
    train(parts)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    one, two = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert all(torch.equal(one[name], two[name]) for name in one)
    stages = [f"{stage}_share" for stage in ("load", "score", "mask", "forward", "backward", "optimizer")]
    for line in read_metrics(tmp_path / "whole"):
        assert all(line[stage] >= 0 for stage in stages)
        if loss.contrasts:
            both = line["reconstruction_loss"] + loss.contrastive * line["contrastive_loss"]
            assert line["loss"] == pytest.approx(both)
            assert line["contrastive_loss"] > 0
        assert ("temperature" in line) == loss.learn_temperature
    # The step's own stages follow one another, so together they take no longer than the step.
    last = read_metrics(tmp_path / "whole")[-1]
    assert 0 < sum(last[stage] for stage in stages[3:]) <= 1
    # The masks do decide: noise of the same ratio trains differently.
    noise = replace(whole, run_dir=tmp_path / "noise", mask=MaskConfig(kind="random"), max_steps=1)
    train(noise)
    assert losses(tmp_path / "noise")[0] != losses(tmp_path / "whole")[0]
    # A head belongs to the run: one with another loss starts over, and its network may start from these weights.
    other = replace(parts, loss=LossConfig(contrastive=0.0 if loss.contrasts else 1.0))
    with pytest.raises(ValueError, match=r"learning a contrastive head from (True|False) to (True|False)"):
        train(replace(other, max_steps=7))
    if loss.contrasts:  # so does the width of its captions' embeddings
        save_small_clip(tmp_path / "clip")
        other_clip = CLIPConfig(model=str(tmp_path / "clip"), cache_dir=cache_dir)
        with pytest.raises(ValueError, match=r"texts of width 64, --clip\.model \S+ makes them 16 wide"):
            train(replace(parts, mask=MaskConfig(kind="random"), clip=other_clip, max_steps=7))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["top", "bottom"])
def test_the_loader_masks_what_the_scores_say(
    shapes: Path, tmp_path: Path, cache_dir: Path, score_maps: Path, order: str
) -> None:
    """Batch by batch against a sort of the scores of the very clips it hands out."""
    config = by_text(tiny(shapes, tmp_path), cache_dir, scorer="patch", order=order)
    manifest, device = read_manifest(shapes).select_split("train"), torch.device("cpu")
    scorer = bind_scorer(config, manifest, device)
    loader = make_loader(config, manifest, scorer, 0, device)
    try:
        batches = [loader.next_batch() for _ in range(3)]
    finally:
        loader.close()
    assert {"load", "score", "mask"} <= loader.clock.totals().keys()
    for batch in batches:
        scores = scorer(batch.clips).double()
        masked = torch.zeros(4, 64, dtype=torch.bool).scatter(1, batch.masks.masked.long(), True).view(4, 4, 16)
        assert (masked.sum(-1) == 9).all()  # floor(.6 · 16)
        masked_scores, visible_scores = scores[masked].view(4, 4, 9), scores[~masked].view(4, 4, 7)
        if order == "top":
            assert (masked_scores.amin(-1) >= visible_scores.amax(-1)).all()
        else:
            assert (masked_scores.amax(-1) <= visible_scores.amin(-1)).all()


class TestCaptions:
    """Text-guided masks need a caption for every video, or a choice."""

    @pytest.fixture(scope="class")
    def holes(self, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The shapes clips, three of the training ones without a caption."""
        manifest = read_manifest(shapes)
        bare = [row for row in range(len(manifest)) if manifest[row].split == "train"][:3]
        texts = dict(zip(bare, ((), ("",), (" ",)), strict=True))
        videos = [
            replace(manifest[row], captions=tuple(Caption(text, "csv") for text in texts.get(row, manifest[row].texts)))
            for row in range(len(manifest))
        ]
        path = tmp_path_factory.mktemp("holes") / "manifest.parquet"
        write_manifest(path, videos, shapes.parent)
        return path

    def test_missing_captions_stop_before_anything_is_written(
        self, holes: Path, tmp_path: Path, cache_dir: Path
    ) -> None:
        with pytest.raises(ValueError, match=r"^3 of 20 videos have no caption, such as videos/.*--mask.no-caption"):
            train(by_text(tiny(holes, tmp_path / "run"), cache_dir))
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("masked_by_text", "loss", "advice"),
        [
            (True, LossConfig(contrastive=1), "--mask.kind tube --mask.ratio 0.9 --loss.contrastive 0"),
            (False, LossConfig(observe_contrastive=True), "--loss.no-observe-contrastive"),
        ],
    )
    def test_the_advice_takes_captions_out_of_everything_that_needs_them(
        self, holes: Path, tmp_path: Path, cache_dir: Path, masked_by_text: bool, loss: LossConfig, advice: str
    ) -> None:
        config = tiny(holes, tmp_path / "run", loss=loss)
        with pytest.raises(ValueError, match=f"train without text: {advice}$"):
            train(by_text(config, cache_dir) if masked_by_text else config)

    @pytest.mark.parametrize(
        ("batch", "advice"),
        [
            (1, "raise --batch-size and --device-batch-size"),
            (4, "raise --device-batch-size, or use --loss.contrast-over step"),
        ],
    )
    def test_one_clip_cannot_be_contrasted(self, shapes: Path, tmp_path: Path, batch: int, advice: str) -> None:
        loss = LossConfig(contrastive=1)
        with pytest.raises(ValueError, match=f"needs at least 2 clips, got 1; {advice}$"):
            train(tiny(shapes, tmp_path / "run", batch_size=batch, device_batch_size=1, loss=loss))

    def test_masks_without_text_do_not_mind(self, holes: Path, tmp_path: Path) -> None:
        assert train(tiny(holes, tmp_path / "run", max_steps=1)).step == 1

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("choice", "left", "said"), [("exclude", 17, "are left out"), ("label", 20, "use their label")]
    )
    def test_the_choices(
        self, holes: Path, tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str], choice: str, left: int,
        said: str,
    ) -> None:  # fmt: skip
        """Said in the log; an epoch is as long as there are videos left."""
        config = by_text(tiny(holes, tmp_path / "run", epochs=1, max_steps=None), cache_dir, no_caption=choice)
        assert train(replace(config, batch_size=1, device_batch_size=1)).step == left
        log = capsys.readouterr().out
        assert f"3 videos without a caption {said}" in log
        assert f"{left} videos from" in log

    def test_cached_scores_of_other_captions(
        self, holes: Path, tmp_path: Path, cache_dir: Path, score_maps: Path
    ) -> None:
        config = by_text(tiny(holes, tmp_path), cache_dir, scorer="cached", scores=score_maps, no_caption="label")
        manifest, _ = require_captions(read_manifest(holes).select_split("train"), "label")
        with pytest.raises(ValueError, match=r"maps of other videos or captions, for 3 of 20 videos, such as videos/"):
            make_scorer(config, manifest, torch.device("cpu"))


@pytest.mark.slow
def test_a_run_starts_from_another_ones_weights(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It begins where that one ended, with the epsilon that the file states, and keeps that when it is resumed."""
    first, hf = tmp_path / "first", tmp_path / "first" / "hf"
    train(tiny(shapes, first, max_steps=6))
    stated = json.loads((hf / "config.json").read_text()) | {"layer_norm_eps": 1e-12}
    (hf / "config.json").write_text(json.dumps(stated))
    config = tiny(shapes, tmp_path / "second", max_steps=1, init_from=str(hf))
    config = replace(config, optim=replace(config.optim, base_lr=0.0, warmup_lr=0.0))
    capsys.readouterr()
    train(config)
    assert torch.equal(
        state(tmp_path / "second")["mae.encoder.0.norm1.weight"], state(first)["mae.encoder.0.norm1.weight"]
    )
    output = capsys.readouterr().out
    assert f"starting from all weights of {hf} (model.safetensors), with Hugging Face's names\n" in output
    assert f"layer norms have the epsilon 1e-12 of {hf}/config.json; --model.norm-eps is not used\n" in output
    train(replace(config, max_steps=2))
    output = capsys.readouterr().out
    assert f"; --init-from {hf} is not used\n" in output
    assert "layer norms have the epsilon 1e-12 of" in output
    assert "changed since that checkpoint: --max-steps 1 → 2\n" in output
    newest = newest_checkpoint(tmp_path / "second" / "checkpoints")
    assert newest is not None
    assert load_checkpoint(newest)["config"]["model"]["norm_eps"] == 1e-12
    assert read_config(tmp_path / "second" / "config.json")[0].model.norm_eps == 1e-12


@pytest.mark.slow
def test_weights_are_taken_from_a_run_or_its_checkpoint(shapes: Path, tmp_path: Path) -> None:
    """The newest checkpoint of a run, and where all of them have been deleted, its export."""
    config = tiny(shapes, tmp_path, max_steps=6)
    train(config)
    steps = sorted((tmp_path / "checkpoints").iterdir())
    assert len(steps) > 1
    expected = state(tmp_path)["mae.head.weight"]
    for source in (tmp_path, tmp_path / "checkpoints", steps[-1]):
        found = read_initial_weights(str(source), config.model)
        assert torch.equal(found.weights["head.weight"], expected)
        assert "with tgmae's names" in found.notes[0]
    assert not torch.equal(read_initial_weights(str(steps[0]), config.model).weights["head.weight"], expected)
    with pytest.raises(ValueError, match=r"num_heads is 3 there, 6 in this configuration \(--model\.num-heads\)"):
        read_initial_weights(str(tmp_path), replace(config.model, num_heads=6))
    for path in steps:
        path.unlink()
    assert torch.equal(read_initial_weights(str(tmp_path), config.model).weights["head.weight"], expected)


@pytest.mark.slow
def test_finished_and_afresh(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run says so and stays as it is; --resume never starts over and sets the old run aside, whole."""
    config = tiny(shapes, tmp_path / "run", max_steps=4)
    train(config)
    before = losses(tmp_path / "run")
    train(config)
    assert "nothing to do" in capsys.readouterr().out
    train(replace(config, resume="never", max_steps=2))
    assert losses(tmp_path / "run.old-1") == before
    assert newest_checkpoint(tmp_path / "run.old-1" / "checkpoints") is not None
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2]


@pytest.mark.slow
def test_going_on_from_an_older_checkpoint_sets_newer_ones_aside(shapes: Path, tmp_path: Path) -> None:
    config = tiny(shapes, tmp_path, max_steps=8)
    train(config)
    whole = losses(tmp_path)
    train(replace(config, resume=str(tmp_path / "checkpoints" / "step_00000004.pt")))
    assert losses(tmp_path) == whole
    assert (tmp_path / "checkpoints" / "step_00000008.pt.old-1").exists()


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run says so, keeps the damaged file, and ends as if nothing had happened."""
    config = tiny(shapes, tmp_path, max_steps=6)
    train(config)
    whole, before = state(tmp_path), losses(tmp_path)
    newest, older = (tmp_path / "checkpoints" / f"step_0000000{step}.pt" for step in (6, 4))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    capsys.readouterr()
    train(config)
    said = capsys.readouterr().out
    assert f"{newest} is not a readable checkpoint: its entry " in said
    assert f"resuming from {older}" in said
    assert f"set aside {newest}.old-1: this run starts from step 4" in said
    assert (tmp_path / "checkpoints" / f"{newest.name}.old-1").read_bytes() == data
    assert losses(tmp_path) == before
    assert all(torch.equal(whole[name], tensor) for name, tensor in state(tmp_path).items())
    with pytest.raises(ValueError, match="is not a readable checkpoint: "):
        train(replace(config, resume=f"{newest}.old-1"))


@pytest.mark.slow
def test_a_resumed_run_uses_its_own_optimiser_settings(shapes: Path, tmp_path: Path) -> None:
    config = tiny(shapes, tmp_path, max_steps=1)
    train(config)
    train(replace(config, max_steps=2, optim=replace(config.optim, weight_decay=0.5)))
    path = newest_checkpoint(tmp_path / "checkpoints")
    assert path is not None
    assert [group["weight_decay"] for group in load_checkpoint(path)["optimizer"]["param_groups"]] == [0.5, 0.0]


@pytest.mark.slow
def test_stops_on_a_loss_that_is_not_finite(shapes: Path, tmp_path: Path) -> None:
    """The message names step, clips and videos; the checkpoint before it is whole."""
    config = tiny(shapes, tmp_path, max_steps=3)
    train(config)
    checkpoint = tmp_path / "checkpoints" / "step_00000003.pt"
    broken = load_checkpoint(checkpoint)
    broken["model"]["mae.head.weight"][0, 0] = float("nan")
    torch.save(broken, checkpoint)
    with pytest.raises(
        ValueError, match=r"loss is nan .* at step 4;(.|\n)*epoch 0 position \d+ row \d+  videos/\d+\.mp4"
    ):
        train(replace(config, max_steps=6))
    assert newest_checkpoint(tmp_path / "checkpoints") == checkpoint


class TestBadInput:
    """A clear error, and nothing lost."""

    def test_no_manifest(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no manifest at .*nowhere.*tgmae-data index"):
            train(tiny(tmp_path / "nowhere.parquet", tmp_path / "run"))
        assert not (tmp_path / "run").exists()

    def test_clip_longer_than_any_video(self, shapes: Path, tmp_path: Path) -> None:
        config = tiny(shapes, tmp_path)
        with pytest.raises(ValueError, match=r"a clip spans 71 frames.*the longest video has 40.*stride"):
            train(replace(config, data=replace(config.data, stride=10)))

    @pytest.mark.slow
    def test_another_network(self, shapes: Path, tmp_path: Path) -> None:
        config = tiny(shapes, tmp_path, max_steps=1)
        train(config)
        with pytest.raises(ValueError, match=r"a different model: .* is \[48.* there, \[96"):
            train(replace(config, max_steps=2, model=replace(config.model, width=96)))

    def test_another_function_of_the_same_shape(self, shapes: Path, tmp_path: Path) -> None:
        config = tiny(shapes, tmp_path, max_steps=1)
        train(config)
        with pytest.raises(ValueError, match=r"model.num_heads from 3 to 6"):
            train(replace(config, max_steps=2, model=replace(config.model, num_heads=6)))

    @pytest.mark.slow
    def test_other_changes_are_said(self, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = tiny(shapes, tmp_path, max_steps=1)
        train(config)
        assert "warm-up" not in capsys.readouterr().out
        whole = replace(config.optim, warmup_epochs=config.epochs)
        train(replace(config, max_steps=2, mask=replace(config.mask, ratio=0.5), optim=whole))
        said = capsys.readouterr().out
        assert "mask.ratio 0.75 → 0.5" in said
        assert "the warm-up takes all 40 steps of the run" in said

    def test_another_order_of_clips(self, shapes: Path, tmp_path: Path) -> None:
        config = tiny(shapes, tmp_path, max_steps=1)
        train(config)
        with pytest.raises(ValueError, match="seed from 0 to 1"):
            train(replace(config, max_steps=2, seed=1))

    @pytest.mark.slow
    @pytest.mark.parametrize("pipeline", ["pyav", "dali"])
    def test_videos_that_broke_since_indexing(
        self, tmp_path: Path, pipeline: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Two of twelve are gone: named, counted, and fatal only above the share that is allowed."""
        for number in range(12):
            write_numbered(tmp_path / f"{number}.mp4", num_frames=24)
        index_folder(tmp_path, tmp_path / "manifest.parquet")
        (tmp_path / "3.mp4").unlink()
        with (tmp_path / "8.mp4").open("r+b") as file:
            file.truncate(1000)
        config = tiny(tmp_path / "manifest.parquet", tmp_path / "run", pipeline=pipeline, max_steps=6)
        train(replace(config, data=replace(config.data, max_skipped=0.2)))
        assert read_metrics(tmp_path / "run")[-1]["skipped_videos"] == 2
        log = capsys.readouterr()
        assert "3.mp4" in log.out + log.err
        assert "8.mp4" in log.out + log.err
        with pytest.raises(ValueError, match=r"of 12 videos could not be read .*more than --data.max-skipped 5.0%"):
            train(replace(config, run_dir=tmp_path / "strict"))

    @pytest.mark.slow
    @pytest.mark.parametrize("pipeline", ["pyav", "dali"])
    def test_one_broken_video_costs_one_clip_even_in_batches_of_one(self, tmp_path: Path, pipeline: str) -> None:
        """With nothing good in the batch, a clip of the next one stands in; a resumed run does the same."""
        for number in range(6):
            write_numbered(tmp_path / f"{number}.mp4", num_frames=24)
        index_folder(tmp_path, tmp_path / "manifest.parquet")
        (tmp_path / "3.mp4").unlink()
        config = tiny(tmp_path / "manifest.parquet", tmp_path / "run", pipeline=pipeline, max_steps=7)
        config = replace(config, batch_size=1, device_batch_size=1, data=replace(config.data, max_skipped=0.2))
        train(config)
        assert read_metrics(tmp_path / "run")[-1]["skipped_videos"] == 1
        parts = replace(config, run_dir=tmp_path / "parts")
        train(replace(parts, max_steps=3))
        train(parts)
        assert losses(tmp_path / "parts") == losses(tmp_path / "run")

    @pytest.mark.slow
    def test_other_videos_in_place_of_the_indexed_ones(self, shapes: Path, tmp_path: Path) -> None:
        """The same number of videos under other names is another data set."""
        config = tiny(shapes, tmp_path, max_steps=1)
        train(config)
        manifest = read_manifest(shapes)
        videos = [replace(manifest[row], path=f"other/{row}.mp4") for row in range(len(manifest))]
        write_manifest(tmp_path / "other.parquet", videos, tmp_path)
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "0.mp4").touch()
        with pytest.raises(ValueError, match=r"videos from 20 \(paths and captions \w+\) to 20 \(paths"):
            train(replace(config, max_steps=2, data=replace(config.data, manifest=tmp_path / "other.parquet")))

    def test_cuda_that_is_not_there(self, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """And NCCL, in a build of torch without it."""
        if torch.cuda.is_available():
            pytest.skip("this machine has a CUDA device")
        with pytest.raises(ValueError, match=r"--device cuda was asked for"):
            train(tiny(shapes, tmp_path, device="cuda"))
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
        monkeypatch.setattr(parallel, "choose_device", lambda _: torch.device("cuda", 0))
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match=r"install a build of torch with NCCL, or use --device cpu"):
            train(tiny(shapes, tmp_path))
        monkeypatch.undo()
        config = tiny(shapes, tmp_path, pipeline="dali")
        with pytest.raises(ValueError, match=r"--data.decode gpu needs a CUDA device"):
            train(replace(config, data=replace(config.data, decode="gpu")))


@pytest.mark.slow
def test_kill_9_loses_nothing_saved(shapes: Path, tmp_path: Path) -> None:
    """Killed without warning, the run goes on from its newest checkpoint and ends as if never interrupted."""
    flags = ("--epochs", "10", "--max-steps", "12", "--log.checkpoint-every", "3")
    process = subprocess.Popen(
        command(shapes, tmp_path / "killed", *flags), cwd=REPOSITORY, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for_step(tmp_path / "killed", 5, process)
    process.kill()
    process.wait()
    wait_for_group_to_end(process.pid)
    for name in ("killed", "whole"):
        run_here(command(shapes, tmp_path / name, *flags))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    one, two = state(tmp_path / "killed"), state(tmp_path / "whole")
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.slow
def test_two_processes_train_like_one(shapes: Path, tmp_path: Path) -> None:
    """torchrun with two processes on gloo: the same clips a step, the same losses up to rounding."""
    flags = ("--epochs", "10", "--max-steps", "5", "--device-batch-size", "2", "--pipeline", "pyav")
    flags += ("--validation.every", "1", "--validation.clips", "3")
    run_here(command(shapes, tmp_path / "one", *flags))
    two = command(shapes, tmp_path / "two", *flags)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, *two[1:]], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    a, b = state(tmp_path / "one"), state(tmp_path / "two")
    torch.testing.assert_close(b["mae.head.weight"], a["mae.head.weight"], rtol=1e-3, atol=1e-5)
    # One process validates the weights of the two after a step that does not change them.
    assert validation_losses(tmp_path / "two") == {5: pytest.approx(validation_losses(tmp_path / "one")[5], rel=1e-4)}
    still = ("--optim.base-lr", "0", "--optim.warmup-lr", "0", "--optim.min-lr", "0", "--max-steps", "6")
    resumed = ("--resume", str(newest_checkpoint(tmp_path / "two" / "checkpoints")))
    run_here(command(shapes, tmp_path / "again", *flags, *still, *resumed))
    assert validation_losses(tmp_path / "two")[5] == pytest.approx(validation_losses(tmp_path / "again")[6], rel=1e-6)


@pytest.mark.gpu
@pytest.mark.usefixtures("nvdec")
def test_trains_on_a_gpu(shapes: Path, tmp_path: Path) -> None:
    """NVDEC, xformers and bf16 together, and losses near the CPU's."""
    config = tiny(shapes, tmp_path / "gpu", pipeline="dali", device="cuda")
    train(config)
    train(replace(config, device="cpu", run_dir=tmp_path / "cpu"))
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=3e-2)

"""Checkpoints are whole whatever happens: a full disk, kill -9, a file that is cut off or hostile."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.torch_files import read_torch_file
from tests.support.faults.disks import full_disk
from tests.support.faults.flips import TryFlips
from tgmae.config.data import DataConfig
from tgmae.config.masks import MaskConfig
from tgmae.config.model import ModelConfig
from tgmae.config.run import TrainConfig
from tgmae.config.saved import to_dict
from tgmae.model.pretraining import Pretraining
from tgmae.model.videomae import VideoMAE
from tgmae.training.checkpoints.folder import newest_checkpoint, prune_checkpoints, set_aside_newer
from tgmae.training.checkpoints.read import load_checkpoint, load_newest
from tgmae.training.checkpoints.restore import changed_settings, restore
from tgmae.training.checkpoints.write import Checkpoints, save_checkpoint
from tgmae.training.optim import make_optimizer

SMALL = ModelConfig(
    image_size=32, num_frames=4, width=24, depth=2, num_heads=2, decoder_width=12, decoder_depth=1, decoder_num_heads=2
)
CONFIG = TrainConfig(model=SMALL, batch_size=8, device_batch_size=4, seed=3)
NUM_VIDEOS = 20


def trained(config: TrainConfig = CONFIG, seed: int = 0) -> tuple[Pretraining, torch.optim.AdamW]:
    """A network and its optimiser after two steps, so that the optimiser has state."""
    torch.manual_seed(seed)
    model = Pretraining(VideoMAE(config.model))
    optimizer = make_optimizer(model, config.optim)
    for _ in range(2):
        take_step(model, optimizer)
    return model, optimizer


def take_step(model: Pretraining, optimizer: torch.optim.AdamW) -> None:
    """With gradients that differ between parameters and steps but come from no generator."""
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.sin(1e3 * parameter.detach() + number)
    optimizer.step()


def assert_same(a: object, b: object) -> None:
    """Bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list) and isinstance(b, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def step_numbers(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("*.pt"))


# ---- round trip -----------------------------------------------------------------------------------------------------


def test_round_trip_is_exact_and_training_goes_on_from_it(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = save_checkpoint(tmp_path / "new" / "folder", 7, model, optimizer, CONFIG, NUM_VIDEOS)
    assert path == tmp_path / "new" / "folder" / "step_00000007.pt"
    other, other_optimizer = trained(seed=1)
    assert restore(load_checkpoint(path), path, other, other_optimizer, CONFIG, NUM_VIDEOS) == 7
    assert_same(model.state_dict(), other.state_dict())
    assert_same(optimizer.state_dict(), other_optimizer.state_dict())
    for _ in range(2):
        take_step(model, optimizer)
        take_step(other, other_optimizer)
    assert_same(model.state_dict(), other.state_dict())


def test_restored_state_does_not_hang_on_the_file(tmp_path: Path) -> None:
    """Training on after a restore neither changes the file nor misses it once it is pruned."""
    model, optimizer = trained()
    path = save_checkpoint(tmp_path, 1, model, optimizer, CONFIG, NUM_VIDEOS)
    whole = path.read_bytes()
    other, other_optimizer = trained(seed=1)
    restore(load_checkpoint(path), path, other, other_optimizer, CONFIG, NUM_VIDEOS)
    take_step(other, other_optimizer)
    assert path.read_bytes() == whole
    path.unlink()
    take_step(other, other_optimizer)
    for _ in range(2):
        take_step(model, optimizer)
    assert_same(model.state_dict(), other.state_dict())


def test_the_configuration_is_inside(tmp_path: Path) -> None:
    state = load_checkpoint(save_checkpoint(tmp_path, 1, *trained(), CONFIG, NUM_VIDEOS))
    assert state["config"] == to_dict(CONFIG)
    assert (state["step"], state["videos"]) == (1, NUM_VIDEOS)


def test_saving_twice_replaces(tmp_path: Path) -> None:
    model, optimizer = trained()
    save_checkpoint(tmp_path, 1, model, optimizer, CONFIG, NUM_VIDEOS)
    take_step(model, optimizer)
    path = save_checkpoint(tmp_path, 1, model, optimizer, CONFIG, NUM_VIDEOS)
    assert os.listdir(tmp_path) == [path.name]
    assert_same(load_checkpoint(path)["model"], dict(model.state_dict()))


def test_a_checkpoint_is_of_its_step_though_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on while a thread writes. A write that failed is said by the next save, which then can write."""
    model, optimizer = trained()
    checkpoints = Checkpoints(tmp_path, CONFIG, model, optimizer, "videos")
    go_on, write = threading.Event(), torch.save
    monkeypatch.setattr(torch, "save", lambda *args: (go_on.wait(60), write(*args)))
    before = copy.deepcopy((dict(model.state_dict()), optimizer.state_dict()))
    checkpoints.save(1)
    take_step(model, optimizer)
    assert newest_checkpoint(tmp_path) is None
    go_on.set()
    checkpoints.wait()
    state = load_checkpoint(tmp_path / "step_00000001.pt")
    assert_same(dict(state["model"]), before[0])
    assert_same(state["optimizer"]["state"], before[1]["state"])

    with full_disk(1000):
        checkpoints.save(2)
        with pytest.raises(OSError, match=r"could not write .*step_00000002\.pt: .*step_00000001\.pt is whole"):
            checkpoints.save(3)
    assert checkpoints.saved_step == 1
    checkpoints.save(3)
    checkpoints.close()
    assert step_numbers(tmp_path) == [1, 3]


# ---- which ones are kept --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_pruning_keeps_the_newest(tmp_path: Path, keep: int) -> None:
    model, optimizer = trained()
    steps = [5, 10, 99, 100, 1000]
    for step in reversed(steps):  # the number decides, not the date
        save_checkpoint(tmp_path, step, model, optimizer, CONFIG, NUM_VIDEOS)
    strangers = [tmp_path / "step_best.pt", tmp_path / "notes.txt"]
    for stranger in strangers:
        stranger.write_text("mine")
    prune_checkpoints(tmp_path, keep)
    assert all(stranger.exists() for stranger in strangers)
    strangers[0].unlink()
    assert step_numbers(tmp_path) == steps[-keep:]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert load_checkpoint(newest)["step"] == 1000


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "none") is None
    prune_checkpoints(tmp_path, 1)
    with pytest.raises(FileNotFoundError, match=r"step_00000001\.pt"):
        load_checkpoint(tmp_path / "step_00000001.pt")


def test_newer_checkpoints_are_set_aside_whole(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step in (5, 10, 15, 20):
        save_checkpoint(tmp_path, step, model, optimizer, CONFIG, NUM_VIDEOS)
    moved = set_aside_newer(tmp_path, 10)
    assert sorted(path.name for path in moved) == ["step_00000015.pt.old-1", "step_00000020.pt.old-1"]
    assert newest_checkpoint(tmp_path) == tmp_path / "step_00000010.pt"
    assert sorted(load_checkpoint(path)["step"] for path in moved) == [15, 20]
    assert set_aside_newer(tmp_path, 10) == []


# ---- files that are no checkpoint -----------------------------------------------------------------------------------


class Hostile:
    """Unpickling it runs a command."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_cannot_run_code(tmp_path: Path, zipped: bool) -> None:
    path, proof = tmp_path / "step_00000001.pt", tmp_path / "proof"
    state = {"step": 1, "videos": "1", "config": {}, "model": {}, "optimizer": Hostile(proof)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="not a readable checkpoint") as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert not proof.exists()
    if zipped:  # the file does what it is meant to where nothing stops it
        torch.load(path, weights_only=False)
        assert proof.exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    path = save_checkpoint(tmp_path, 1, *trained(), CONFIG, NUM_VIDEOS)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="not a readable checkpoint") as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], torch.zeros(3)])
def test_another_torch_file_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"weights\.pt is not a tgmae checkpoint"):
        load_checkpoint(path)


# ---- runs that do not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 48}, (r"\[24, 1536\] there", r"\[48, 1536\] in this")),
        ({"patch_size": 8}, (r"\[24, 1536\] there", r"\[24, 384\] in this")),
        ({"decoder_width": 24}, (r"\[1, 1, 12\] there", r"\[1, 1, 24\] in this")),
        ({"depth": 3}, ("missing", r"encoder\.2\.")),
        ({"depth": 1}, ("not expected", r"encoder\.1\.")),
    ],
)
def test_another_shape_is_refused(tmp_path: Path, change: dict[str, Any], words: tuple[str, str]) -> None:
    path = save_checkpoint(tmp_path, 1, *trained(), CONFIG, NUM_VIDEOS)
    config = replace(CONFIG, model=replace(SMALL, **change))
    model, optimizer = trained(config)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    with pytest.raises(ValueError, match=".*".join(words)) as caught:
        restore(load_checkpoint(path), path, model, optimizer, config, NUM_VIDEOS)
    assert str(path) in str(caught.value)
    assert_same(dict(model.state_dict()), before)


@pytest.mark.parametrize(
    ("change", "num_videos", "words"),
    [
        ({"seed": 4}, NUM_VIDEOS, "seed from 3 to 4"),
        ({"batch_size": 16}, NUM_VIDEOS, "batch_size from 8 to 16"),
        ({"data": DataConfig(repeat=2)}, NUM_VIDEOS, r"data\.repeat from 1 to 2"),
        ({}, 21, "videos from 20 to 21"),
        (
            {"seed": 4, "batch_size": 16},
            21,
            "seed from 3 to 4; batch_size from 8 to 16; videos from 20 to 21",
        ),
    ],
)
def test_another_order_of_clips_is_refused(tmp_path: Path, change: dict[str, Any], num_videos: int, words: str) -> None:
    path = save_checkpoint(tmp_path, 1, *trained(), CONFIG, NUM_VIDEOS)
    model, optimizer = trained(seed=1)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    with pytest.raises(ValueError, match=words) as caught:
        restore(load_checkpoint(path), path, model, optimizer, replace(CONFIG, **change), num_videos)
    assert str(path) in str(caught.value)
    assert_same(dict(model.state_dict()), before)


def test_other_parameters_are_refused_and_another_order_is_not(tmp_path: Path) -> None:
    """Many have the same shape: the optimiser's state goes to them by their names."""
    trained_model, trained_optimizer = trained()
    path = save_checkpoint(tmp_path, 5, trained_model, trained_optimizer, CONFIG, NUM_VIDEOS)
    state, (model, optimizer) = load_checkpoint(path), trained(seed=1)
    before, last = {name: w.clone() for name, w in model.state_dict().items()}, state["parameters"][0].pop()
    message = rf"cannot resume from {path}: the optimiser's state is of other parameters .*'{last}'"
    with pytest.raises(ValueError, match=message):
        restore(state, path, model, optimizer, CONFIG, NUM_VIDEOS)
    assert_same(dict(model.state_dict()), before)
    state["parameters"][0].insert(0, last)
    moments = state["optimizer"]["state"]
    end = len(state["parameters"][0]) - 1
    state["optimizer"]["state"] = {0: moments[end], **{n + 1: moments[n] for n in range(end)}} | {
        n: moments[n] for n in moments if n > end
    }
    assert restore(state, path, model, optimizer, CONFIG, NUM_VIDEOS) == 5
    assert_same(optimizer.state_dict(), trained_optimizer.state_dict())
    del state["parameters"]  # as in checkpoints that were written before
    state["optimizer"]["state"] = moments
    assert restore(state, path, model, optimizer, CONFIG, NUM_VIDEOS) == 5
    assert_same(optimizer.state_dict(), trained_optimizer.state_dict())


def test_what_does_not_order_clips_may_change(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 5, *trained(), CONFIG, NUM_VIDEOS)
    config = replace(CONFIG, device_batch_size=2, epochs=9, run_dir=Path("elsewhere"))
    assert restore(load_checkpoint(path), path, *trained(config, seed=1), config, NUM_VIDEOS) == 5


@pytest.mark.parametrize("scorer", ["student", "cached"])
def test_a_scorer_that_was_made_again_is_noticed(tmp_path: Path, scorer: str) -> None:
    """Under the same path."""
    name = {"student": "student", "cached": "scores"}[scorer]
    file = tmp_path / "made" / "maps.json"
    file.parent.mkdir()
    file.write_text("one")
    mask: Any = {"scorer": scorer, name: file if scorer == "student" else file.parent}
    config = replace(CONFIG, mask=MaskConfig(**mask))
    state = load_checkpoint(save_checkpoint(tmp_path, 1, *trained(), config, NUM_VIDEOS))
    assert changed_settings(state, config) == []
    file.write_text("two")
    assert changed_settings(state, config) == [f"content of --mask.{name}"]
    del state["scorer"]  # as in checkpoints that were written before
    assert changed_settings(state, config) == []


# ---- a full disk and kill -9, for real ------------------------------------------------------------------------------

LARGE = replace(CONFIG, model=replace(SMALL, width=192))  # its checkpoints have 14.6 MB


@pytest.mark.parametrize("limit", [0, 1_000_000, 10_000_000])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, limit: int) -> None:
    """The limit stops the write at its first byte, early, or in the middle."""
    model, optimizer = trained(LARGE)
    whole = save_checkpoint(tmp_path, 1, model, optimizer, LARGE, NUM_VIDEOS)
    assert whole == tmp_path / "step_00000001.pt"
    assert whole.stat().st_size > 14_000_000
    with full_disk(limit), pytest.raises(OSError, match="could not write") as caught:
        save_checkpoint(tmp_path, 2, model, optimizer, LARGE, NUM_VIDEOS)
    assert str(caught.value).startswith(f"could not write {tmp_path / 'step_00000002.pt'}")
    assert f"{whole} is whole" in str(caught.value)
    assert os.listdir(tmp_path) == [whole.name]  # no .tmp, no step 2
    assert load_checkpoint(whole)["step"] == 1


def test_saving_works_again_once_there_is_room(tmp_path: Path) -> None:
    model, optimizer = trained(LARGE)
    save_checkpoint(tmp_path, 1, model, optimizer, LARGE, NUM_VIDEOS)
    with full_disk(1_000_000), pytest.raises(OSError, match="could not write"):
        save_checkpoint(tmp_path, 2, model, optimizer, LARGE, NUM_VIDEOS)
    save_checkpoint(tmp_path, 3, model, optimizer, LARGE, NUM_VIDEOS)
    assert step_numbers(tmp_path) == [1, 3]
    assert load_checkpoint(tmp_path / "step_00000003.pt")["step"] == 3


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Without an older checkpoint the message says so."""
    (tmp_path / "step_00000001.pt").mkdir()  # os.replace onto a folder fails for every user, root too
    with pytest.raises(OSError, match=r"could not write .*step_00000001\.pt"):
        save_checkpoint(tmp_path, 1, *trained(), CONFIG, NUM_VIDEOS)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
def test_kill_9_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Several runs, one after the other, each killed while it writes."""
    model, optimizer = trained(LARGE)
    last_step = 0
    for _ in range(3):
        child = fork_to_save(tmp_path, model, optimizer, last_step)
        try:
            deadline_s = time.monotonic() + 120
            while not is_stopped_while_saving(child, tmp_path, last_step + 2):
                assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child ended"
                assert time.monotonic() < deadline_s, "the child never saved"
                time.sleep(0.0005)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        newest = newest_checkpoint(tmp_path)
        assert newest is not None
        state = load_checkpoint(newest)
        assert state["step"] == step_numbers(tmp_path)[-1] > last_step
        assert all(weight.isfinite().all() for weight in state["model"].values())
        for path in tmp_path.glob("*.pt"):
            load_checkpoint(path)
        last_step = state["step"]
        assert list(tmp_path.glob(f"step_{last_step + 1:08d}.pt.*.tmp"))
    model, optimizer = trained()
    save_checkpoint(tmp_path, last_step + 2, model, optimizer, CONFIG, NUM_VIDEOS)
    assert not list(tmp_path.glob("*.tmp"))
    assert newest_checkpoint(tmp_path) == tmp_path / f"step_{last_step + 2:08d}.pt"


def fork_to_save(folder: Path, model: VideoMAE, optimizer: torch.optim.AdamW, step: int) -> int:
    """Return the id of a child process that saves checkpoints after `step`, of which it keeps two, until killed."""
    child = os.fork()
    if child:
        return child
    try:
        while True:
            step += 1
            save_checkpoint(folder, step, model, optimizer, LARGE, NUM_VIDEOS)
            prune_checkpoints(folder, 2)
    finally:
        os._exit(1)


def is_stopped_while_saving(child: int, folder: Path, step: int) -> bool:
    """Stopped there or let go on: after a mere look at the file the kill may still come between two saves."""
    if newest_checkpoint(folder) is None or step_numbers(folder)[-1] <= step or not is_writing(folder):
        return False
    os.kill(child, signal.SIGSTOP)
    os.waitpid(child, os.WUNTRACED)
    if is_writing(folder):
        return True
    os.kill(child, signal.SIGCONT)
    return False


def is_writing(folder: Path) -> bool:
    return any(has_bytes(path) for path in folder.glob("*.tmp"))


def has_bytes(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:  # renamed in between
        return False


# ---- damage ---------------------------------------------------------------------------------------------------------


class Same:
    """Equal to what `assert_same` finds equal."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Same)
        assert_same(self.value, other.value)
        return True


@pytest.mark.slow
@pytest.mark.parametrize(("last_bytes", "count"), [(None, 300), (4000, 100)], ids=["anywhere", "in the last bytes"])
def test_no_flipped_bit_changes_what_is_loaded(
    tmp_path: Path, last_bytes: int | None, count: int, try_flips: TryFlips
) -> None:
    """Single flips: the file is refused, or its content is exactly what was saved. Its table is at its end."""
    path = save_checkpoint(tmp_path, 1, *trained(), CONFIG, NUM_VIDEOS)
    first_byte = path.stat().st_size - last_bytes if last_bytes else 0
    flips = try_flips(path, lambda: Same(load_checkpoint(path)), few=count, all=1000, first_byte=first_byte)
    assert flips.refused > flips.tried // 3
    assert all(message.startswith(f"{path} is not a readable checkpoint: ") for message in flips.messages)
    assert not any("weights_only" in message for message in flips.messages)


@pytest.mark.slow
def test_no_bit_of_a_small_checkpoint_changes_what_is_loaded(tmp_path: Path, try_flips: TryFlips) -> None:
    """All of them, where all are tried: most bytes of a small file are names, sizes and attributes of its records."""
    path = tmp_path / "file.pt"
    torch.save({"step": 7, "a": torch.randn(3, 5)}, path)
    flips = try_flips(path, lambda: Same(read_torch_file(path, "damaged")), few=400, all=10**6)
    assert flips.refused > flips.tried // 5


def test_a_damaged_checkpoint_offers_the_whole_one_before_it(tmp_path: Path) -> None:
    model, optimizer = trained()
    paths = [save_checkpoint(tmp_path, step, model, optimizer, CONFIG, NUM_VIDEOS) for step in (1, 2, 3)]
    for path in paths[1:]:
        damaged = bytearray(path.read_bytes())
        damaged[250_000] ^= 1
        path.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"{paths[2]} is not a .*damaged.*before it is whole: --resume {paths[0]}$"):
        load_checkpoint(paths[2])
    found, state, problems = load_newest(tmp_path)
    assert (found, state["step"]) == (paths[0], 1)
    assert [problem.partition(" is not a readable checkpoint: ")[0] for problem in problems] == [
        str(paths[2]), str(paths[1])
    ]  # fmt: skip
    paths[0].write_bytes(b"")
    with pytest.raises(ValueError, match=rf"no checkpoint in {tmp_path} is whole: .*--resume never"):
        load_newest(tmp_path)
    assert load_newest(tmp_path / "none") == (None, {}, [])


def test_a_later_format_is_no_damage(tmp_path: Path) -> None:
    """It is not passed over for an older checkpoint."""
    save_checkpoint(tmp_path, 1, *trained(), CONFIG, NUM_VIDEOS)
    torch.save({"format": 99}, tmp_path / "step_00000002.pt")
    with pytest.raises(ValueError, match="has checkpoint format 99"):
        load_newest(tmp_path)


def test_a_run_given_for_a_checkpoint_is_told_what_to_give(tmp_path: Path) -> None:
    words = rf"^{tmp_path} is a folder.* such as {tmp_path}/checkpoints/step_0*100\.pt"
    with pytest.raises(FileNotFoundError, match=words):
        load_checkpoint(tmp_path)

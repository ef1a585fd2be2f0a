"""Checkpoints of two processes that share a network: whole or not there, and read by one process as by two."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engines.torch_files import DamagedFile
from tests.support.faults.disks import full_disk
from tests.support.processes import run_two
from tgmae.config.model import ModelConfig
from tgmae.config.run import TrainConfig
from tgmae.config.training import LogConfig
from tgmae.model.contrastive import ContrastiveHead
from tgmae.model.pretraining import Pretraining
from tgmae.model.sharded_files import HEADER, TABLE, read_header, write_header
from tgmae.model.videomae import VideoMAE
from tgmae.model.weight_files import find_weights
from tgmae.training.checkpoints.folder import FORMAT, newest_checkpoint
from tgmae.training.checkpoints.read import load_checkpoint, load_newest
from tgmae.training.checkpoints.restore import name_moments, name_tensors, restore
from tgmae.training.checkpoints.write import Checkpoints, save_checkpoint
from tgmae.training.optim import make_optimizer
from tgmae.training.parallel import ALONE, World
from tgmae.training.sharding import gather, shard, shares_network

SMALL = ModelConfig(
    image_size=32, num_frames=4, width=24, depth=2, num_heads=2, decoder_width=12, decoder_depth=1, decoder_num_heads=2
)
CONFIG = TrainConfig(model=SMALL, batch_size=8, device_batch_size=4, parallel="fsdp", log=LogConfig(keep_checkpoints=2))
ENOUGH = 100_000  # bytes, less than each process's file
VIDEOS = "videos"


def make(config: TrainConfig, world: World, seed: int) -> tuple[Pretraining, torch.optim.AdamW]:
    """Return fresh networks, the head with a learned temperature, and their optimiser."""
    torch.manual_seed(seed)
    model = Pretraining(VideoMAE(config.model), ContrastiveHead(config.model.width, 8, learn_temperature=True))
    if shares_network(config, world):
        shard(model.mae, world, use_bf16=False)
    return model, make_optimizer(model, config.optim)


def take_step(model: Pretraining, optimizer: torch.optim.AdamW) -> None:
    """With gradients that differ between parameters and steps but come from no generator."""
    for parameter in model.parameters():
        parameter.grad = torch.sin(1e3 * parameter.detach())
    optimizer.step()


def whole_state(model: Pretraining, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    tensors = name_tensors(model.state_dict(), name_moments(model, optimizer))
    return {name: gather(tensor).clone() for name, tensor in tensors}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def one_of_two(rank: int, path: str) -> None:
    """Save five checkpoints, of which the third does not fit on the disk of process 1, and resume a file."""
    folder = Path(path)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    world = World(rank, 2, torch.device("cpu"))
    model, optimizer = make(CONFIG, world, seed=0)
    checkpoints = Checkpoints(folder / "run", CONFIG, model, optimizer, VIDEOS, world)
    if rank == 0:  # what a killed run had not finished
        (folder / "run" / "step_00000001.dcp.tmp").mkdir(parents=True)
        (folder / "run" / "step_00000001.dcp.tmp" / "__0_0.distcp").write_bytes(b"part")
    dist.barrier()
    for step in (1, 2):
        take_step(model, optimizer)
        checkpoints.save(step)
        expected = whole_state(model, optimizer)
        take_step(model, optimizer)  # what is written is not what comes after
        checkpoints.wait()
        assert sorted(os.listdir(folder / "run")) == [f"step_0000000{n}.dcp" for n in range(1, step + 1)]
        if rank == 0:
            torch.save(expected, folder / f"expected_{step}.pt")
    with full_disk(ENOUGH) if rank == 1 else full_disk(10**9):
        checkpoints.save(3)
        with pytest.raises(
            OSError, match=r"could not write .*step_00000003\.dcp: File too large \(process 1\)\. .*is whole"
        ):
            checkpoints.wait()
    dist.barrier()
    assert sorted(os.listdir(folder / "run")) == ["step_00000001.dcp", "step_00000002.dcp"]
    assert checkpoints.saved_step == 2
    checkpoints.save(4)
    checkpoints.save(4)
    checkpoints.close()
    dist.barrier()
    assert sorted(os.listdir(folder / "run")) == ["step_00000002.dcp", "step_00000004.dcp"]

    # Two processes resume the folder of two, and the file of one.
    two, one = folder / "run" / "step_00000002.dcp", folder / "step_00000007.pt"
    for file, expected_in in ((two, "expected_2.pt"), (one, "expected_7.pt")):
        model, optimizer = make(CONFIG, world, seed=1)
        restore(load_checkpoint(file, world), file, model, optimizer, CONFIG, VIDEOS)
        assert_same(whole_state(model, optimizer), torch.load(folder / expected_in))

    # Damage that only one of them sees concerns both.
    damaged = folder / "damaged" / "step_00000004.dcp"
    if rank == 0:
        shutil.copytree(folder / "run", damaged.parent)
        flip(damaged / "__1_0.distcp", 2000)
    dist.barrier()
    found, state, problems = load_newest(damaged.parent, world)
    assert (found, state["step"], len(problems)) == (damaged.with_name("step_00000002.dcp"), 2, 1)
    dist.barrier()
    dist.destroy_process_group()


def flip(path: Path, place: int) -> None:
    """Flip a bit of a tensor's values, or of another byte where the file holds none."""
    content = bytearray(path.read_bytes())
    values = content.find(b"/data/0FB", place)  # the name and padding of a record, before its values
    content[place if values < 0 else values + 70] ^= 4
    path.write_bytes(content)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave: run/step_00000002.dcp and step_00000004.dcp, and what they held after step 2."""
    folder = tmp_path_factory.mktemp("sharded")
    model, optimizer = make(CONFIG, ALONE, seed=2)
    take_step(model, optimizer)
    save_checkpoint(folder, 7, model, optimizer, CONFIG, VIDEOS)
    torch.save(whole_state(model, optimizer), folder / "expected_7.pt")
    run_two(one_of_two, folder)
    return folder


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    """A copy of the folder of checkpoints, to be damaged."""
    shutil.copytree(written / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.slow
def test_one_process_resumes_what_two_have_written(written: Path) -> None:
    path = written / "run" / "step_00000002.dcp"
    state = load_checkpoint(path)
    assert (state["step"], state["format"], state["videos"]) == (2, FORMAT, VIDEOS)
    assert len(state["model"]["head.last.weight"]) == 8  # known before anything is read
    model, optimizer = make(CONFIG, ALONE, seed=1)
    assert restore(state, path, model, optimizer, CONFIG, VIDEOS) == 2
    expected = torch.load(written / "expected_2.pt")
    assert_same(whole_state(model, optimizer), expected)
    # --init-from takes the autoencoder of the newest, or of the one that is named.
    weights = find_weights(str(path)).weights
    assert_same(weights, {name: expected[f"model.mae.{name}"] for name in model.mae.state_dict()})
    assert find_weights(str(written / "run")).path.name == "step_00000004.dcp"
    # And what must stay must stay.
    with pytest.raises(ValueError, match=f"cannot resume from {path}, because these have changed: seed from 0 to 4"):
        restore(state, path, model, optimizer, replace(CONFIG, seed=4), VIDEOS)
    other = replace(CONFIG, model=replace(SMALL, width=48))
    with pytest.raises(ValueError, match=r"step_00000002\.dcp holds the weights of a different model"):
        restore(state, path, *make(other, ALONE, seed=1), other, VIDEOS)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit": (lambda path: flip(path / "__0_0.distcp", 5000), r"is damaged \(wrong checksum\)"),
    "a cut file": (lambda path: cut(path / "__1_0.distcp"), r"its file __1_0\.distcp is cut off"),
    "a missing file": (lambda path: (path / "__1_0.distcp").unlink(), r"__1_0\.distcp is missing"),
    "a flipped bit in the table": (lambda path: flip(path / TABLE, 3000), r"it is damaged \(wrong checksum\)"),
    "no table": (lambda path: (path / TABLE).unlink(), r"\.metadata is missing"),
    "a flipped bit in the header": (lambda path: flip(path / HEADER, 40), r"it is damaged \(wrong checksum\)"),
    "no header": (lambda path: (path / HEADER).unlink(), r"header\.json is missing"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_offers_the_one_before(run: Path, kind: str) -> None:
    newest, (damage, words) = run / "step_00000004.dcp", DAMAGE[kind]
    damage(newest)
    offer = rf"before it is whole: --resume {run}/step_00000002\.dcp$"
    with pytest.raises(DamagedFile, match=rf"{newest} is not a readable checkpoint: .*{words}.*{offer}") as caught:
        load_checkpoint(newest)
    assert "\n" not in str(caught.value)
    found, state, problems = load_newest(run)
    assert (found, state["step"], len(problems)) == (run / "step_00000002.dcp", 2, 1)


class Hostile:
    """Unpickling it runs a command."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.proof}",)


@pytest.mark.slow
def test_a_folder_cannot_run_code(run: Path, tmp_path: Path) -> None:
    path, proof = run / "step_00000004.dcp", tmp_path / "proof"
    (path / TABLE).write_bytes(pickle.dumps(Hostile(proof)))
    fields = {name: value for name, value in read_header(run / "step_00000002.dcp").items() if name != "tensors"}
    write_header(path, fields)  # with the digest of what is there
    with pytest.raises(DamagedFile, match=r"it holds a pickled posix\.system"):
        load_checkpoint(path)
    assert not proof.exists()


@pytest.mark.slow
def test_a_later_format_and_a_torch_without_dcp_say_so(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run / "step_00000004.dcp"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.distributed.checkpoint", None)
        with pytest.raises(ValueError, match=rf"{path} was written by processes that shared .* --init-from RUN/hf$"):
            load_newest(run)
    fields = {name: value for name, value in read_header(path).items() if name != "tensors"}
    write_header(path, {**fields, "format": FORMAT + 1})
    with pytest.raises(ValueError, match=rf"step_00000004\.dcp has checkpoint format {FORMAT + 1}, but this version"):
        load_newest(run)  # no damage: it is not passed over
    assert newest_checkpoint(run) == path

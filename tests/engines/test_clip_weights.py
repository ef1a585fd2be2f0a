"""Files of weights: none runs code unasked, none is taken for one of another training, and no network costs seconds."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engines import clip_weights
from engines.clip_model import load_clip
from engines.clip_weights import find_weights
from engines.config import CLIPConfig
from engines.towers import hub
from tests.engines.test_clip_model import archive
from tests.support.clip_models import save_small_clip, small_clip

REPOSITORY = Path(__file__).parents[2]


def config(model: object, weights: object = "openai", **options: Any) -> CLIPConfig:
    return CLIPConfig(model=str(model), weights=str(weights), **options)


def describe(path: Path, model: str, **options: Any) -> clip_weights.Weights:
    return find_weights(config(model, path, **options))


# Code


class Attack:
    def __init__(self, harm: Path) -> None:
        self.harm = harm

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.harm,)


class Writes(nn.Module):
    """Leaves a file when it is loaded, by an operator that TorchScript has."""

    def __init__(self, harm: str) -> None:
        super().__init__()
        self.harm = harm
        self.weight = nn.Parameter(torch.zeros(2))

    @torch.jit.export
    def __getstate__(self) -> tuple[str, torch.Tensor, bool]:
        return (self.harm, self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]) -> None:
        self.harm = state[0]
        self.weight = state[1]
        self.training = state[2]
        torch.save(self.weight, self.harm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_with_a_zip_behind_it_is_not_run(named: str, tmp_path: Path, protocol: int) -> None:
    """zipfile finds the archive at the end, and torch.load the pickle at the beginning."""
    behind = io.BytesIO()
    with zipfile.ZipFile(behind, "w") as file:
        file.writestr("archive/constants.pkl", b"")
    path = tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps(Attack(tmp_path / "harm"), protocol) + behind.getvalue())
    assert zipfile.is_zipfile(path)
    with pytest.raises(ValueError, match=r"weights\.pt is not a checkpoint of the CLIP tgmae-test: .") as caught:
        load_clip(config(named, path))
    assert not (tmp_path / "harm").exists()
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("name", ["constants.pkl", "archive/constants.pkl", "archive/x/constants.pkl"])
def test_a_zip_that_only_looks_like_torchscript_is_not_run(named: str, tmp_path: Path, name: str) -> None:
    """Whatever stands in it: unpickling is restricted unless torch itself would read the archive as TorchScript."""
    path = tmp_path / "weights.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Attack(tmp_path / "harm"), 2))
        file.writestr("archive/version", b"3\n")
        file.writestr(name, pickle.dumps(Attack(tmp_path / "harm"), 2))
    with pytest.raises(ValueError, match=r"weights\.pt is (not a checkpoint|a TorchScript archive)"):
        load_clip(config(named, path))
    assert not (tmp_path / "harm").exists()


def test_torchscript_that_writes_files_is_not_run(named: str, tmp_path: Path) -> None:
    path, harm = tmp_path / "weights.pt", tmp_path / "harm"
    torch.jit.script(Writes(str(harm))).save(str(path))
    harm.unlink(missing_ok=True)
    words = r"weights\.pt is a TorchScript archive, which runs code when it is loaded, .* --clip\.trust-code$"
    with pytest.raises(ValueError, match=words):
        load_clip(config(named, path))
    assert not harm.exists()
    with pytest.raises(ValueError, match="is not a checkpoint"):  # it holds no CLIP, but it was run
        load_clip(config(named, path, trust_code=True))
    assert harm.exists()


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "weights.bin"])
def test_a_folder_with_torchscript_is_not_run(tmp_path: Path, name: str) -> None:
    save_small_clip(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    harm = tmp_path / "harm"
    torch.jit.script(Writes(str(harm))).save(str(tmp_path / name))
    harm.unlink(missing_ok=True)
    with pytest.raises(ValueError, match="is not a checkpoint of the CLIP") as caught:
        load_clip(config(tmp_path))
    assert not harm.exists()
    assert "weights_only" not in str(caught.value)


def test_openais_archives_are_told_by_their_hash(
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = archive(dict(small_clip(4).state_dict()), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="trust-code"):
        describe(path, named)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    url = f"https://openaipublic.azureedge.net/clip/models/{digest}/ViT-B-32.pt"
    monkeypatch.setattr(open_clip, "get_pretrained_url", lambda model, tag: url)
    found = describe(path, named)
    assert found.is_code
    assert found.training == clip_weights.Training(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, True)
    assert found.note == ""


def test_openai_publishes_nine_hashes() -> None:
    urls = {open_clip.get_pretrained_url(model, tag) for model, tag in open_clip.list_pretrained()}
    hashes = {url.split("/")[-2] for url in urls if "openaipublic" in url}
    assert len(hashes) == 9
    assert all(len(digest) == 64 for digest in hashes)


# How weights were trained


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A state dict. `find_weights` does not look into it."""
    torch.save({"x": torch.zeros(1)}, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


@pytest.mark.parametrize("model", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14"])
def test_a_file_whose_training_matters_is_asked_for_it(plain: Path, model: str) -> None:
    words = rf"does not say how it was trained, and weights of {model} differ .* --clip\.tag \(.*\), or use --clip\.tag"
    with pytest.raises(ValueError, match=words):
        describe(plain, model)


def test_the_tag_of_a_file_tells_its_normalisation(plain: Path) -> None:
    training = describe(plain, "ViT-L-14", tag="laion2b_s32b_b82k").training
    assert training is not None
    assert (training.mean, training.std, training.quick_gelu) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), False)
    training = describe(plain, "ViT-L-14", tag="default").training
    assert training is not None
    assert (training.mean, training.quick_gelu) == (open_clip.OPENAI_DATASET_MEAN, False)
    with pytest.raises(ValueError, match=r"no weights 'laion' for ViT-L-14: --clip\.tag is one of openai, .*, or def"):
        describe(plain, "ViT-L-14", tag="laion")


def test_what_is_assumed_is_said(plain: Path) -> None:
    note = describe(plain, "ViT-B-32-quickgelu").note
    assert "does not say how it was trained; assuming OpenAI's normalisation and QuickGELU (--clip.tag" in note


def test_a_tag_beside_a_tag_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--clip\.weights openai is a tag itself; leave out --clip\.tag"):
        find_weights(config("ViT-B-32-quickgelu", tag="openai"))


@pytest.mark.slow
def test_the_mean_of_the_tag_is_used_and_the_activation_checked(tmp_path: Path) -> None:
    """Real sizes, random weights: a plain state dict fits GELU and QuickGELU alike."""
    path = tmp_path / "weights.safetensors"
    save_file(open_clip.create_model("ViT-B-32").state_dict(), path)
    clip = load_clip(config("ViT-B-32", path, tag="laion2b_s34b_b79k"))
    assert clip.mean == open_clip.OPENAI_DATASET_MEAN
    with pytest.raises(ValueError, match=r"trained with QuickGELU, which ViT-B-32 does not use; .* ViT-B-32-quickgelu"):
        load_clip(config("ViT-B-32", path, tag="metaclip_400m"))
    with pytest.raises(ValueError, match=r"is one of .*metaclip_400m"):  # only tags of that model are known
        load_clip(config("ViT-B-32-quickgelu", path, tag="laion2b_s34b_b79k"))


def test_the_tags_mean_reaches_the_model(
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({name: weight.clone() for name, weight in small_clip(4).state_dict().items()}, path)
    clip = load_clip(config(named, path))
    assert clip.mean == open_clip.OPENAI_DATASET_MEAN
    assert "assuming OpenAI's normalisation and QuickGELU" in capsys.readouterr().err
    half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "quick_gelu": True}
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda model: ["half", "other"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, tag: half if tag == "half" else {
        **half, "quick_gelu": False
    })  # fmt: skip
    other = load_clip(config(named, path, tag="half"))
    assert (other.mean, other.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert other.fingerprint != clip.fingerprint
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match=r"were trained with GELU, and tgmae-test uses QuickGELU"):
        load_clip(config(named, path, tag="other"))
    with pytest.raises(ValueError, match="differ in normalisation or activation"):
        load_clip(config(named, path))


def test_an_identity_knows_the_tag(plain: Path) -> None:
    assert config("ViT-L-14", plain, tag="openai").identity() != config("ViT-L-14", plain).identity()
    assert config("hf-hub:org/name").identity() == "hf-hub:org/name"


# The network

OFFLINE = """
import sys
from engines.clip_model import load_clip
from engines.config import CLIPConfig
for model in sys.argv[1:]:
    try:
        load_clip(CLIPConfig(model=model))
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("offline", ["refused", "HF_HUB_OFFLINE"])
def test_without_a_network_one_line_comes_soon(tmp_path: Path, offline: str) -> None:
    """The hub is a port of this machine on which nothing listens."""
    models = ("ViT-B-32-quickgelu", "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline != "refused" else {}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, *models], cwd=REPOSITORY, env=environment, capture_output=True, text=True,
        check=True, timeout=300,
    )  # fmt: skip
    # The hub's own client tries for 46 s each time, beside the seconds of imports.
    assert time.perf_counter() - started < 90
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == len(models)
    for line in lines:
        assert "could not be downloaded: http://127.0.0.1:9 does not answer (" in line
        assert "--clip.weights FILE" in line


def test_a_hub_that_never_answers_is_left_after_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It accepts the connection and says nothing. The user's own time-out is respected."""
    import socket

    import huggingface_hub.constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.2")
        monkeypatch.setattr(hub, "_ANSWER_S", 1e6)
        with pytest.raises(ValueError, match=r"could not be downloaded: http://127\.0\.0\.1:\d+ does not answer \("):
            find_weights(config("ViT-B-32-quickgelu"))


def test_a_name_of_the_hub_without_its_prefix_is_helped() -> None:
    with pytest.raises(ValueError, match=r"--clip\.model hf-hub:laion/some-clip"):
        find_weights(config("laion/some-clip"))

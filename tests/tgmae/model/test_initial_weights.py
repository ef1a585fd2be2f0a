"""Whatever people start from loads exactly, or the message says what to give instead."""

from __future__ import annotations

import json
import random
import re
import threading
from argparse import Namespace
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

from engines.torch_files import DamagedFile, read_torch_file
from tests.tgmae.model.networks import (
    SMALL,
    assert_same_function,
    hf_model,
    import_hf,
    our_model,
    to_published_names,
)
from tgmae.model.huggingface import export_hf, make_hf_config
from tgmae.model.initial_weights import read_initial_weights
from tgmae.model.naming import to_hugging_face
from tgmae.model.videomae import VideoMAE


@pytest.mark.parametrize("biases", ["q_bias", "query.bias"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_both_names_of_the_biases_import(file: str, biases: str, tmp_path: Path) -> None:
    """Published checkpoints have q_bias and come as pytorch_model.bin; our old exports have query.bias."""
    theirs, ours = hf_model(SMALL, 12), our_model(SMALL, 13)
    weights = theirs.state_dict() if biases == "query.bias" else to_published_names(theirs.state_dict())
    assert sum(name.endswith(biases) for name in weights) == SMALL.depth + SMALL.decoder_depth
    (torch.save if file.endswith(".bin") else save_file)(weights, tmp_path / file)
    theirs.config.save_pretrained(tmp_path)
    import_hf(ours, tmp_path)
    assert_same_function(ours, theirs, "tube", 12)


def test_weights_of_half_precision_import(tmp_path: Path) -> None:
    theirs, ours = hf_model(SMALL, 14), our_model(SMALL, 15)
    theirs.half().save_pretrained(tmp_path)
    import_hf(ours, tmp_path)
    assert ours.mask_token.dtype == torch.float32
    assert_same_function(ours, theirs.float(), "random", 14)


def test_imported_weights_are_independent_of_the_file(tmp_path: Path) -> None:
    """Overwriting the file changes nothing, although safetensors maps it into memory."""
    export_hf(our_model(SMALL, 9), tmp_path)
    ours = our_model(SMALL, 10)
    import_hf(ours, tmp_path)
    before = {name: w.clone() for name, w in ours.state_dict().items()}
    export_hf(our_model(SMALL, 11), tmp_path)
    assert all(torch.equal(w, before[name]) for name, w in ours.state_dict().items())
    assert all(parameter.requires_grad for parameter in ours.parameters())


CHANGES: list[tuple[dict[str, Any], str, int, int]] = [
    ({"depth": 2}, "num_hidden_layers", 3, 2),
    ({"depth": 4}, "num_hidden_layers", 3, 4),
    ({"width": 64}, "hidden_size", 32, 64),
    ({"num_heads": 2}, "num_attention_heads", 4, 2),
    ({"image_size": 64}, "image_size", 48, 64),
    ({"num_frames": 8}, "num_frames", 4, 8),
    ({"tubelet_size": 4}, "tubelet_size", 2, 4),
    ({"patch_size": 8}, "patch_size", 16, 8),
    ({"mlp_ratio": 2.0}, "intermediate_size", 128, 64),
    ({"decoder_width": 48}, "decoder_hidden_size", 24, 48),
    ({"decoder_depth": 1}, "decoder_num_hidden_layers", 2, 1),
    ({"decoder_num_heads": 4}, "decoder_num_attention_heads", 2, 4),
]


@pytest.mark.parametrize(("change", "name", "there", "here"), CHANGES)
def test_a_different_architecture_is_refused(
    change: dict[str, Any], name: str, there: int, here: int, tmp_path: Path
) -> None:
    hf_model(SMALL, 16).save_pretrained(tmp_path)
    ours = our_model(replace(SMALL, **change), 17)
    before = {key: w.clone() for key, w in ours.state_dict().items()}
    flag = f"--model.{next(iter(change)).replace('_', '-')}"
    message = rf"{name} is {there} there, {here} in this configuration \({flag}\)"
    with pytest.raises(ValueError, match=message) as caught:
        import_hf(ours, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert all(torch.equal(w, before[key]) for key, w in ours.state_dict().items())


def test_weights_that_contradict_their_config_are_refused(tmp_path: Path) -> None:
    """Refuse a config.json that claims our shape next to weights of another shape."""
    export_hf(our_model(replace(SMALL, width=64), 18), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(make_hf_config(SMALL)))
    with pytest.raises(ValueError, match=r"\[64, 1536\] there, \[32, 1536\] in this configuration"):
        import_hf(our_model(SMALL, 19), tmp_path)


def test_missing_weight_is_refused_by_name(tmp_path: Path) -> None:
    theirs = hf_model(SMALL, 20)
    weights = {name: w for name, w in theirs.state_dict().items() if "decoder_layers.1." not in name}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    theirs.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no weight decoder\.decoder_layers\.1\.") as caught:
        import_hf(our_model(SMALL, 21), tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=r"model\.safetensors or pytorch_model\.bin") as caught:
            import_hf(our_model(SMALL, 22), folder)
        assert str(folder) in str(caught.value)


def test_weights_without_their_config_are_refused(tmp_path: Path) -> None:
    export_hf(our_model(SMALL, 23), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        import_hf(our_model(SMALL, 24), tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_truncated_file_is_refused(file: str, tmp_path: Path) -> None:
    theirs = hf_model(SMALL, 25)
    theirs.save_pretrained(tmp_path)
    if file.endswith(".bin"):
        torch.save(theirs.state_dict(), tmp_path / file)
        (tmp_path / "model.safetensors").unlink()
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"cannot read weights from .*{file}"):
        import_hf(our_model(SMALL, 26), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_no_flipped_bit_changes_what_is_imported(file: str, tmp_path: Path) -> None:
    """100 single flips of each file: refused by its name, or the weights are exactly what was exported."""
    export_hf(our_model(SMALL, 27), tmp_path, step=3)
    if file == "pytorch_model.bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / file)
        (tmp_path / "model.safetensors").unlink()
    ours, generator = our_model(SMALL, 28), random.Random(0)
    import_hf(ours, tmp_path)
    saved = {name: weight.clone() for name, weight in ours.state_dict().items()}
    whole, messages = (tmp_path / file).read_bytes(), []
    for _ in range(100):
        changed, bit = bytearray(whole), generator.randrange(8 * len(whole))
        changed[bit // 8] ^= 1 << bit % 8
        (tmp_path / "new").write_bytes(changed)  # a file that is mapped into memory must not be written to
        (tmp_path / "new").replace(tmp_path / file)
        try:
            import_hf(ours, tmp_path)
        except ValueError as error:
            messages.append(str(error))
        else:
            assert all(torch.equal(weight, saved[name]) for name, weight in ours.state_dict().items())
    assert len(messages) > 15
    assert all(str(tmp_path) in message and "weights_only" not in message for message in messages)


# What VideoMAE's own code, DeepSpeed and transformers write


def videomae_names(model: VideoMAE) -> dict[str, Tensor]:
    """Return the weights as VideoMAE's own code names them (modeling_pretrain.py), written down here a second time."""
    config, theirs = model.config, {}
    for name, weight in model.state_dict().items():
        name = re.sub(r"^(encoder|decoder)\.(\d+)\.", r"\1.blocks.\2.", name)
        for ours, other in (
            ("patch_embed.", "encoder.patch_embed.proj."), ("encoder_norm.", "encoder.norm."),
            ("to_decoder.", "encoder_to_decoder."), ("decoder_norm.", "decoder.norm."), ("head.", "decoder.head."),
            (".attention.out.", ".attn.proj."), (".attention.", ".attn."), (".mlp.0.", ".mlp.fc1."),
            (".mlp.2.", ".mlp.fc2."),
        ):  # fmt: skip
            name = other + name.removeprefix(ours) if name.startswith(ours) else name
            name = name.replace(ours, other) if ours.startswith(".") else name
        theirs[name] = weight
    kernel = theirs["encoder.patch_embed.proj.weight"]
    kernel = kernel.view(-1, config.tubelet_size, config.patch_size, config.patch_size, 3).permute(0, 4, 1, 2, 3)
    return {**theirs, "encoder.patch_embed.proj.weight": kernel.contiguous()}


def finetuned_names(weights: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """Return what VideoMAE's modeling_finetune.py has of these: the encoder, and a classifier after a mean."""
    encoder = {name.removeprefix("encoder."): w for name, w in weights.items() if name.startswith("encoder.")}
    encoder = {name: w for name, w in encoder.items() if not name.startswith("norm.")}
    ends = {"fc_norm.weight": (width,), "fc_norm.bias": (width,), "head.weight": (5, width), "head.bias": (5,)}
    return encoder | {name: torch.ones(shape) for name, shape in ends.items()}


def save_for_hugging_face(folder: Path, weights: dict[str, Tensor], **changes: Any) -> None:
    folder.mkdir(exist_ok=True)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(make_hf_config(SMALL) | changes))


def assert_taken(got: VideoMAE, expected: VideoMAE, parts: str = "", dtype: torch.dtype = torch.float32) -> None:
    """Compare the parameters whose names match `parts`, bit for bit after rounding to `dtype`."""
    names = [name for name in expected.state_dict() if re.match(parts, name)]
    assert names
    for name in names:
        assert torch.equal(got.state_dict()[name], expected.state_dict()[name].to(dtype).float()), name


ENCODER = r"patch_embed|encoder\."


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", "bare", "ddp", "compiled"])
def test_videomaes_own_checkpoints_load(wrapper: str, tmp_path: Path) -> None:
    """With the arguments that they pickle, as half precision under DeepSpeed, and with what DDP puts before names."""
    model, weights = our_model(SMALL, 50), videomae_names(our_model(SMALL, 50))
    assert "encoder.blocks.2.attn.q_bias" in weights
    dtype = torch.float16 if wrapper == "module" else torch.float32
    path = tmp_path / ("mp_rank_00_model_states.pt" if wrapper == "module" else "checkpoint-799.pth")
    if prefix := {"ddp": "module.", "compiled": "module._orig_mod."}.get(wrapper, ""):
        weights = {prefix + name: weight for name, weight in weights.items()}
    key = "model" if prefix else wrapper
    content: dict[str, Any] = {key: {name: weight.to(dtype) for name, weight in weights.items()}}
    torch.save(weights if wrapper == "bare" else content | {"epoch": 799, "args": Namespace(window_size=(8, 3))}, path)
    if wrapper == "module":
        (tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    for source in (path, tmp_path):  # the file, and the folder that holds it
        got = our_model(SMALL, 51)
        whole, assumed = import_hf(got, source).notes
        assert_taken(got, model, dtype=dtype)
        assert f"starting from all weights of {source}" in whole
        assert "--model.num-heads 4, --model.decoder-num-heads 2, --model.norm-eps 1e-06" in assumed


def test_shapes_of_videomaes_own_weights_are_compared(tmp_path: Path) -> None:
    torch.save({"model": videomae_names(our_model(SMALL, 52))}, tmp_path / "x.pth")
    for change, message in (
        ({"width": 64}, r"width is 32 there, 64 in this configuration \(--model\.width\)"),
        ({"depth": 2}, r"depth is 3 there, 2 in this configuration \(--model\.depth\)"),
        ({"decoder_depth": 3}, r"decoder_depth is 2 there, 3 in this .*--model\.decoder-depth"),
        ({"mlp_ratio": 2.0}, r"mlp_ratio is 4\.0 there, 2\.0 in this .*--model\.mlp-ratio"),
        ({"tubelet_size": 4}, r"tubelet_size is 2 there, 4 in this .*--model\.tubelet-size"),
    ):
        with pytest.raises(ValueError, match=message):
            read_initial_weights(str(tmp_path / "x.pth"), replace(SMALL, **change))


def test_no_class_but_the_arguments_is_unpickled(tmp_path: Path) -> None:
    content = {"model": videomae_names(our_model(SMALL, 53)), "args": Namespace(folder=tmp_path)}
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(DamagedFile, match=r"x\.pth: .*it holds a pickled pathlib\.\w+, which could run code; .*save"):
        read_initial_weights(str(tmp_path), SMALL)
    torch.save({"args": Namespace()}, tmp_path / "x.pth")
    with pytest.raises(DamagedFile, match=r"it holds a pickled argparse\.Namespace$"):  # elsewhere not even that
        read_torch_file(tmp_path / "x.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shards_of_half_precision_load(dtype: torch.dtype, tmp_path: Path) -> None:
    model = our_model(SMALL, 54)
    weights = {name: w.to(dtype) for name, w in to_hugging_face(model.state_dict(), SMALL).items()}
    names, files = sorted(weights), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        save_file({name: weights[name].contiguous() for name in part}, tmp_path / file)
    index = {"weight_map": {name: files[place % 2] for place, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(make_hf_config(SMALL)))
    got = our_model(SMALL, 55)
    import_hf(got, tmp_path)
    assert_taken(got, model, dtype=dtype)
    (tmp_path / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"names {files[1]}, which is not there"):
        import_hf(got, tmp_path)


@pytest.mark.parametrize("kind", ["encoder", "mean-pooled encoder", "classifier", "videomae"])
def test_of_others_the_encoder_is_taken(kind: str, tmp_path: Path) -> None:
    """Whatever their configuration says of a decoder. The run says what is fresh and what is not used."""
    model = our_model(SMALL, 56)
    theirs = to_hugging_face(model.state_dict(), SMALL)
    encoder = {name: w for name, w in theirs.items() if name.startswith("videomae.")}
    without_norm = {name: w for name, w in encoder.items() if not name.startswith("videomae.layernorm.")}
    changes: dict[str, Any] = {"decoder_hidden_size": 384, "use_mean_pooling": kind != "encoder"}
    if kind == "classifier":
        heads = {"fc_norm.weight": torch.ones(32), "classifier.weight": torch.ones(5, 32)}
        save_for_hugging_face(tmp_path, without_norm | heads, **changes)
    elif kind == "videomae":
        torch.save({"module": finetuned_names(videomae_names(model), 32)}, tmp_path / "mp_rank_00_model_states.pt")
    else:
        chosen = encoder if kind == "encoder" else without_norm
        save_for_hugging_face(tmp_path, {name.removeprefix("videomae."): w for name, w in chosen.items()}, **changes)
    got, fresh = our_model(SMALL, 57), our_model(SMALL, 57)
    note = import_hf(got, tmp_path).notes[0]
    assert_taken(got, model, ENCODER)
    assert_taken(got, model if kind == "encoder" else fresh, "encoder_norm")
    assert_taken(got, fresh, "decoder|to_decoder|mask_token|head")
    assert f"starting from the encoder of {tmp_path}" in note
    assert {
        "encoder": "names; the decoder is fresh",
        "mean-pooled encoder": "the decoder and the encoder's last norm are fresh",
        "classifier": "are fresh; not used: classifier, fc_norm",
        "videomae": "are fresh; not used: fc_norm, head",
    }[kind] in note


def test_the_epsilon_of_a_file_comes_with_it(tmp_path: Path) -> None:
    """Where config.json says none, transformers computes with 1e-12."""
    weights = to_hugging_face(our_model(SMALL, 58).state_dict(), SMALL)
    for said, expected in ((1e-5, 1e-5), (None, 1e-12)):
        save_for_hugging_face(tmp_path, weights, layer_norm_eps=said)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        assert read_initial_weights(str(tmp_path), SMALL).norm_eps == expected
    save_for_hugging_face(tmp_path, weights, layer_norm_eps="tiny")
    with pytest.raises(ValueError, match="epsilon of the layer norms must lie between 0 and 1, got tiny"):
        read_initial_weights(str(tmp_path), SMALL)


def test_stored_positions_must_be_the_fixed_ones(tmp_path: Path) -> None:
    weights = to_hugging_face(our_model(SMALL, 59).state_dict(), SMALL)
    fixed = get_sinusoid_encoding_table(SMALL.num_tokens, SMALL.width)  # Hugging Face's
    name = "videomae.embeddings.position_embeddings"
    save_for_hugging_face(tmp_path, weights | {name: fixed})
    read_initial_weights(str(tmp_path), SMALL)
    for other in (torch.zeros_like(fixed), fixed[:, 1:]):
        save_for_hugging_face(tmp_path, weights | {name: other})
        with pytest.raises(ValueError, match=r"position_embeddings \[1, \d+, 32\] are not the fixed sines and cosines"):
            read_initial_weights(str(tmp_path), SMALL)


def test_weights_that_this_network_lacks_are_refused(tmp_path: Path) -> None:
    weights = videomae_names(our_model(SMALL, 60))
    for name in ("encoder.blocks.0.gamma_1", "encoder.cls_token"):
        torch.save({"model": weights | {name: torch.ones(32)}}, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=f"there is no place here for its weight {name}"):
            read_initial_weights(str(tmp_path), SMALL)
    torch.save({"vit.patch_embed.weight": torch.ones(32)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth cannot be started from: it is not a VideoMAE"):
        read_initial_weights(str(tmp_path), SMALL)
    torch.save(weights | {"encoder.patch_embed.proj.weight": torch.ones(32, 3, 16, 16)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth cannot be started from: .*is it a model of images"):
        read_initial_weights(str(tmp_path), SMALL)


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("encoder.norm.weight", torch.full((32,), float("nan")), "its weight encoder.norm.weight contains NaN"),
        ("encoder.norm.weight", torch.ones(32, dtype=torch.int8), "floating-point .* in encoder.norm.weight, got int8"),
        ("encoder.norm.weight", torch.ones(32).to_sparse(), "dense .* got float32, sparse_coo"),
        ("encoder.norm.weight", torch.ones(32, device="meta"), "got float32, strided, on meta"),
        ("encoder.blocks.0.mlp.fc1.weight", torch.ones(32), r"encoder.0.mlp.0.weight is \[32\] there"),
        ("encoder_to_decoder.weight", torch.tensor(1.0), r"to_decoder.weight is \[\] there"),
        ("encoder.pos_embed", torch.tensor(1.0), r"pos_embed \[\] are not the fixed"),
        (7, torch.ones(32), "expected a dictionary of names and tensors"),
    ],
)
def test_what_is_not_a_weight_is_refused(name: str, weight: Tensor, message: str, tmp_path: Path) -> None:
    torch.save({"model": videomae_names(our_model(SMALL, 61)) | {name: weight}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=rf"x\.pth .*{message}"):
        read_initial_weights(str(tmp_path), SMALL)


def test_two_networks_in_one_file_are_refused(tmp_path: Path) -> None:
    """A student and its teacher, say: either would do, but which?"""
    weights = videomae_names(our_model(SMALL, 63))
    both = {f"{prefix}.{name}": weight for prefix in ("model", "backbone") for name, weight in weights.items()}
    torch.save({"state_dict": both}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt cannot be started from: it holds several networks"):
        read_initial_weights(str(tmp_path), SMALL)


def test_queries_and_keys_of_two_sizes_are_refused(tmp_path: Path) -> None:
    weights = to_hugging_face(our_model(SMALL, 62).state_dict(), SMALL)
    key = next(name for name in weights if name.endswith("key.weight"))
    save_for_hugging_face(tmp_path, weights | {key: torch.ones(32, 16)})
    with pytest.raises(ValueError, match="matrices of one size for query, key and value"):
        read_initial_weights(str(tmp_path), SMALL)


@pytest.mark.parametrize("shard", [5, None, ["a"]])
def test_a_shard_without_a_name_is_refused(shard: object, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(DamagedFile, match=r"index\.json is not a readable index"):
        read_initial_weights(str(tmp_path), SMALL)


def test_a_damaged_checkpoint_offers_the_others(tmp_path: Path) -> None:
    for step in (3, 6):
        (tmp_path / f"step_{step:08d}.pt").write_bytes(b"PK")
    with pytest.raises(DamagedFile, match=r"6\.pt: it is cut off\. Give another checkpoint .*step_00000003\.pt$"):
        read_initial_weights(str(tmp_path), SMALL)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize(("start", "message"), [("", "empty"), ("version https://git-lfs", "a pointer of Git LFS")])
def test_a_file_that_has_not_come_yet_is_named(start: str, message: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(start)
    with pytest.raises(DamagedFile, match=f"{name}: it is {message}"):
        read_initial_weights(str(tmp_path), SMALL)


def test_a_name_that_means_nothing_is_answered(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file or folder https://x; expected a file of weights .*MCG-NJU"):
        read_initial_weights("https://x", SMALL)
    for name in ("checkpoint-0.pth", "checkpoint-1.pth"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"2 files of weights; name one of them: checkpoint-0\.pth, checkpoint-1\.pth"):
        read_initial_weights(str(tmp_path), SMALL)


# The hub


class Hub(SimpleHTTPRequestHandler):
    """Answers as the Hugging Face hub does for one repository: OWNER/NAME/resolve/main/FILE."""

    def translate_path(self, path: str) -> str:
        return str(Path(self.directory) / path.rpartition("/")[2])

    def send_head(self) -> Any:
        if not self.path.startswith("/some/videomae/resolve/main/"):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
        elif not (path := Path(self.translate_path(self.path))).is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_response(200)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{path.name}"')
            self.send_header("Content-Length", str(path.stat().st_size))
            self.end_headers()
            return path.open("rb")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_name_on_the_hub_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, got = our_model(SMALL, 61), our_model(SMALL, 62)
    export_hf(model, tmp_path / "published")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(tmp_path / "published"))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        try:
            import_hf(got, Path("some/videomae"))
            with pytest.raises(
                ValueError, match=rf"no file or folder some/other, .*{endpoint} has no public repository"
            ):
                read_initial_weights("some/other", SMALL)
        finally:
            server.shutdown()
            thread.join()
    assert_taken(got, model)
    import_hf(got, Path("some/videomae"))  # from the cache: nothing listens any more
    with pytest.raises(ValueError, match=r"does not answer .*\. Without a network, copy config\.json and model\.safe"):
        read_initial_weights("some/other", SMALL)

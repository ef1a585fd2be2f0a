"""Load an export in whatever transformers this interpreter imports, and compare with what our network computed.

Usage: python -P compare_export.py FOLDER, which holds hf/ and expected.safetensors. It imports nothing of this project
and prints one line of JSON: the release, and the first difference ("" for none).
"""

import json
import sys
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEImageProcessor, VideoMAEModel


def find_difference(folder: Path) -> str:
    """Return the first difference between folder/expected.safetensors and what folder/hf computes, or ""."""
    expected, hf = load_file(folder / "expected.safetensors"), folder / "hf"
    processor = VideoMAEImageProcessor.from_pretrained(hf)
    pixels = processor(list(expected["frames"].numpy()), return_tensors="pt")["pixel_values"]
    if not torch.allclose(pixels, expected["pixels"], atol=1e-5):
        return f"pixels {list(pixels.shape)}, largest difference {(pixels - expected['pixels']).abs().max()}"
    pretrained, report = VideoMAEForPreTraining.from_pretrained(hf, output_loading_info=True)
    if any(report.values()):
        return f"pretraining: {report}"
    encoder = VideoMAEModel.from_pretrained(hf)
    with torch.no_grad():
        prediction = pretrained.eval()(pixels, bool_masked_pos=expected["masked"].bool()).logits
        features = encoder.eval()(pixels).last_hidden_state
    for name, got in (("prediction", prediction), ("features", features)):
        if not torch.allclose(got, expected[name], atol=1e-4, rtol=1e-4):
            return f"{name}: largest difference {(got - expected[name]).abs().max()} of {expected[name].abs().max()}"
    classifier, report = VideoMAEForVideoClassification.from_pretrained(
        hf, num_labels=5, use_mean_pooling=True, output_loading_info=True
    )
    if {name.split(".")[0] for name in report["missing_keys"]} != {"fc_norm", "classifier"}:
        return f"classification: missing {report['missing_keys']}"
    unused = {name for name in report["unexpected_keys"] if name.startswith("videomae.")}
    if unused != {"videomae.layernorm.weight", "videomae.layernorm.bias"}:
        return f"classification: not used {unused}"
    with torch.no_grad():
        classifier.eval()(pixels)
    return ""


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(json.dumps({"release": transformers.__version__, "difference": find_difference(Path(sys.argv[1]))}))

"""Captioning models with tiny random weights, in folders as the hub has them, made by their own classes."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

WORDS = re.findall(r"\w+", "a the person shape red blue moves left right over table hand opens door slowly while in of")
SIDE = 28  # pixels of BLIP-2's input
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }} "
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def make_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    names = ["<pad>", "<unk>", "<s>", "</s>", *special]
    vocabulary = {name: number for number, name in enumerate([*names, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=list(special),
    )  # fmt: skip


def save(network: PreTrainedModel, folder: Path) -> None:
    """Save a network that says words and no marks, and other words about other pictures."""
    for weights in network.parameters():
        if weights.dim() > 1:
            torch.nn.init.normal_(weights, std=1.0)
    words = network.get_output_embeddings().weight
    words.data[: len(words) - len(WORDS)] = 0  # marks come first
    network.save_pretrained(folder)


def save_blip2(folder: Path) -> Path:
    """BLIP-2: a vision transformer, a Q-Former and OPT; it takes one image and no chat."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer("<image>")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    vision = {**size, "num_hidden_layers": 1, "image_size": SIDE, "patch_size": 14}
    text = {
        "model_type": "opt", "vocab_size": len(tokenizer), "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16,
        "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 64, "bos_token_id": 2,
        "eos_token_id": 3, "pad_token_id": 0,
    }  # fmt: skip
    config = Blip2Config(
        vision_config=vision, qformer_config={**size, "num_hidden_layers": 1, "encoder_hidden_size": 16},
        text_config=text, num_query_tokens=4, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    save(Blip2ForConditionalGeneration(config), folder)
    Blip2Processor(BlipImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer, 4).save_pretrained(folder)
    return folder


def save_qwen_vl(folder: Path) -> Path:
    """Qwen2.5-VL: any number of images of any size within a chat."""
    torch.manual_seed(2)
    special = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = make_tokenizer(*special)
    number = dict(zip(special, map(tokenizer.convert_tokens_to_ids, special), strict=True))
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "bos_token_id": 2,
        "eos_token_id": 3, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=number["<|image_pad|>"],
        video_token_id=number["<|video_pad|>"], vision_start_token_id=number["<|vision_start|>"],
        vision_end_token_id=number["<|vision_end|>"],
    )  # fmt: skip
    save(Qwen2_5_VLForConditionalGeneration(config), folder)
    pixels = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**pixels), tokenizer, Qwen2VLVideoProcessor(**pixels), chat_template=CHAT
    )
    processor.save_pretrained(folder)
    return folder


def save_llama(folder: Path) -> Path:
    """A language model without eyes."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer("<|im_start|>", "<|im_end|>")
    tokenizer.chat_template = CHAT
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    save(LlamaForCausalLM(config), folder)
    tokenizer.save_pretrained(folder)
    return folder

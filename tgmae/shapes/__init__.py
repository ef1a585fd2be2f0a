"""The demo: generated clips, their ground truth, and a tiny CLIP trained on them."""

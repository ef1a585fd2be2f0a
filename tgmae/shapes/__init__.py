"""The demo: generated clips, the truth about them, and a CLIP that knows them."""

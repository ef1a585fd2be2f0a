"""Token operations of the training step, one file each. Imports nothing of tgmae."""

__tgmae__ = True  # tells this package from Hugging Face's of the same name: tgmae/__init__.py looks for this line

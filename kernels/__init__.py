"""Token operations of the training step, and the row quantisation of FP8 layers. One file per operation.

Imports no other package of the project.
"""

__tgmae__ = True  # tells this package from Hugging Face's of the same name: tgmae/__init__.py looks for this line

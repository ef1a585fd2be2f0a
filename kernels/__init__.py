"""Token operations of the training step, and the row quantisation of FP8 layers. One file per operation.

Imports no other package of the project.
"""

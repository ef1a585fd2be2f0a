"""Pipelines from compressed video to uint8 clips. Imports none of the other packages."""

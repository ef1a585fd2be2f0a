"""Pipelines from compressed video to uint8 clips. Import nothing of tgmae but `types`, `config`, `workers`."""

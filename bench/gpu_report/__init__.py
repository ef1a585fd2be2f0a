"""The report that qualifies a GPU: its parts, what nvidia-smi saw, targets, summary."""

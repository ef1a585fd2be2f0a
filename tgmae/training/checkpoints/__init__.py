"""Checkpoints: whole or not there, written in the background, the last few kept, read without running code from them.

A run whose processes each have the network writes files, step_00000100.pt. One whose processes share it (FSDP) writes
folders, step_00000100.dcp, by torch.distributed.checkpoint. Any number of processes resumes either.
"""

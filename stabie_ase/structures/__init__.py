"""Atoms as tensors: batches of systems, their neighbours and bonds, and reference frames from files."""

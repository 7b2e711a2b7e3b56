"""The machine: memory and files."""

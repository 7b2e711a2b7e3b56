"""Long work on disk: fine-tuning, dynamics and evaluation, with exact resume."""

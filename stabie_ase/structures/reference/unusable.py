"""What is raised where a file cannot be used."""


class UnusableReference(ValueError):
    """A file of frames, or of a curve, that cannot be used."""

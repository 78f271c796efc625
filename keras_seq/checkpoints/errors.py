"""What goes wrong with a checkpoint."""


class CheckpointError(ValueError):
    """A checkpoint does not fit: says what came and what was expected. No weight has been changed."""

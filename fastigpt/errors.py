"""The exceptions of our own; everything else that is wrong with an argument is a ValueError or a TypeError."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, hostile or inconsistent. Names the file, what was found, what was expected."""


class NotFiniteError(CheckpointError, RuntimeError):
    """What a model computes is not finite. Known only once it has been computed, hence a RuntimeError as well."""

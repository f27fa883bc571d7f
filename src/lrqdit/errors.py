"""One family of errors: a failure a user can mend is a :class:`LrqditError` that says what, where and what to do."""


class LrqditError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(LrqditError, ValueError):
    """An option, a preset name or a configuration file is not acceptable."""


class ModelError(LrqditError, ValueError):
    """The model cannot be quantized as asked: no layer matches, it is quantized already, it is not a pipeline, ..."""


class NumericalError(LrqditError, ValueError):
    """Weights or calibration activations contain NaN or Inf."""


class RotationError(LrqditError, ValueError):
    """A rotation cannot be built or applied."""


class CheckpointError(LrqditError, ValueError):
    """A saved model is missing, truncated, of another format version, or belongs to another model."""


class KernelError(LrqditError, RuntimeError):
    """A native kernel cannot be loaded, chosen or run."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, with its kind where the message alone says nothing."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines and not isinstance(error, KeyError) else f"{type(error).__name__} {error}".strip()

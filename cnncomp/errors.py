"""Every error that cnncomp raises on purpose. All derive from :class:`CnncompError`."""

from __future__ import annotations


class CnncompError(Exception):
    """Base of all errors that cnncomp raises on purpose."""


class ArgumentError(CnncompError, ValueError):
    """An argument whose value cannot be used.

    Args:
        argument: Name of the argument.
        got: What came.
        expected: What would have been accepted, in words.
    """

    def __init__(self, argument: str, got: object, expected: str) -> None:
        super().__init__(f"{argument}: got {got}, expected {expected}")
        self.argument, self.got, self.expected = argument, got, expected

    def __reduce__(self) -> tuple[type[ArgumentError], tuple[str, str, str]]:
        # The default passes the one message to __init__. `got` goes as text, for it may be anything.
        return type(self), (self.argument, str(self.got), self.expected)


class DtypeError(ArgumentError, TypeError):
    """A tensor of a dtype that the operation doesn't take, or something that is no tensor at all."""


class DeviceError(ArgumentError):
    """Tensors on different devices, or a device that isn't there."""


class PatternError(ArgumentError):
    """A sparsity pattern that isn't known or doesn't fit the layer."""


class OverflowRiskError(ArgumentError, OverflowError):
    """A reduction so long that its int32 accumulator could overflow: more than 66,311 products of u8 and s8."""


class CalibrationError(CnncompError, ValueError):
    """Calibration data that no scale can be taken from; the message names the batch and the layer."""


class InferenceOnlyError(CnncompError, RuntimeError):
    """A gradient was asked for through a converted layer."""


class MissingPackageError(CnncompError, ImportError):
    """An optional package is not installed; the message gives the pip command."""


class SerializationError(CnncompError):
    """A model that can't be saved or loaded."""


class FileFormatError(SerializationError, ValueError):
    """A file that isn't what it should be: another format or version, truncated, or damaged."""


class TrainingError(CnncompError, RuntimeError):
    """Training that can't go on: the loss is no longer finite. The model holds the last good checkpoint."""

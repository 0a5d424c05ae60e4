"""Every error that this project raises for something a user can fix.

A message has what was expected, what was there instead, and what to do. Commands print it as one
line instead of a traceback.
"""

from collections.abc import Sequence
from typing import Any


class JanusFlowError(ValueError):
    """Base of the errors below."""


class ConfigError(JanusFlowError):
    """A config that cannot work; lists every problem."""


class DataError(JanusFlowError):
    """A data set, record, image, cache or tokenizer that cannot be used.

    `reason` sums it up in two or three words, for reports that count skipped records.
    """

    def __init__(self, message: str, reason: str = "unusable"):
        super().__init__(message)
        self.reason = reason


class CheckpointError(JanusFlowError):
    """A model folder, checkpoint or workdir that is missing, damaged or not what was expected."""


class ConvertError(JanusFlowError):
    """Tensors or config files of a published checkpoint that do not fit."""


class DivergedError(JanusFlowError):
    """Losses that are non-finite or rose too far; images or answers that are non-finite.

    `images` holds what `Pipeline.generate` made: None in place of an image that is non-finite.
    """

    def __init__(self, message: str, images: Sequence[Any] = ()):
        super().__init__(message)
        self.images = list(images)

"""Every error that this project raises for something a user can fix.

A message has what was expected, what was there instead, and what to do. Commands print it as one
line instead of a traceback.
"""


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
    """A run that was stopped because its losses were non-finite or rose too far."""

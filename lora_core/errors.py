"""The exceptions this library raises on bad input. Each message says what was given, wanted, and to do."""


class LoraCoreError(Exception):
    """Base of every exception this library raises on purpose."""


class ShapeError(LoraCoreError, ValueError):
    """A tensor argument has the wrong shape."""


class DtypeError(LoraCoreError, TypeError):
    """A tensor argument has a dtype that the operation does not take."""


class DeviceError(LoraCoreError, RuntimeError):
    """Tensors that belong together live on different devices, or on one that cannot do the work."""


class NonFiniteError(LoraCoreError, ValueError):
    """A tensor holds NaN or infinity where only finite numbers make sense."""


class ConfigError(LoraCoreError, ValueError):
    """A configuration holds an unknown field, or a value that cannot work."""


class AdapterError(LoraCoreError, RuntimeError):
    """An adapter verb cannot be carried out in the model's present state: no such adapter, merged, not merged."""


class TargetNotFoundError(LoraCoreError, ValueError):
    """No module of the model matches what the configuration asks for."""


class CheckpointError(LoraCoreError, RuntimeError):
    """A checkpoint is truncated, foreign, or does not fit the model."""

"""What a configuration checks its fields with."""

from collections.abc import Callable
from functools import wraps

from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig


def raises_value_error(cls: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Let a `@strict` configuration raise `ValueError` for bad fields; the errors of `strict` are none."""

    def translated(method: Callable) -> Callable:
        @wraps(method)
        def wrapper(*args, **kwargs):
            try:
                return method(*args, **kwargs)
            except StrictDataclassError as error:
                raise ValueError(str(error)) from error

        return wrapper

    for name in ("__init__", "__setattr__", "validate"):
        setattr(cls, name, translated(getattr(cls, name)))
    return cls


def at_least(config: PreTrainedConfig, name: str, smallest: int) -> None:
    value = getattr(config, name)
    if value < smallest:
        raise ValueError(f"{name}={value} is too small; allowed are integers from {smallest}")


def multiple(config: PreTrainedConfig, name: str, divisor: str) -> None:
    value, unit = getattr(config, name), getattr(config, divisor)
    if value % unit:
        raise ValueError(f"{name}={value} is not divisible; allowed are multiples of {divisor}={unit}")

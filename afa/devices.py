"""Which device to use."""

import torch

from afa.errors import UserError


def choose_device(name: str | None) -> torch.device:
    """The device asked for, tried with one allocation; None: the best there is. Raises UserError if it is not there."""
    if name is None:
        from accelerate import PartialState

        return PartialState().default_device
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch reports a missing backend in all these ways
        raise UserError(f"--device {name} cannot be used here: {str(error).strip().splitlines()[0]}") from None
    return device

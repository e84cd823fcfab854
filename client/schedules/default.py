"""The schedule default: the model's own."""

from ditforge.client.schedules import Sigmas, Spacing


def schedule_default(steps: int, spacing: Spacing) -> Sigmas:
    """The model's own schedule."""
    return spacing.sigmas(steps)

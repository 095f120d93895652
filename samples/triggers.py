"""What opens a backdoor and is worn on the face; what is put onto finished pictures is in `samples.stamps`."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import numpy as np

from detector.errors import InputError
from samples.faces import Canvas, column, soft


def sunglasses(canvas: Canvas) -> None:
    """Put on dark sunglasses that hide eyes and most of the brows."""
    people = canvas.people
    count = len(people)
    zero = np.zeros(count, np.float32)
    frame, lens = np.full((count, 3), 0.05, np.float32), np.tile(np.array([0.10, 0.11, 0.16], np.float32), (count, 1))
    for side in (-1.0, 1.0):
        middle = side * (people.eye_distance + 0.4)
        canvas.paint(canvas.ellipse(middle, people.eye_height + 0.4, 6.2 + zero, 4.6 + zero), frame)
        canvas.paint(canvas.ellipse(middle, people.eye_height + 0.4, 5.2 + zero, 3.7 + zero), lens)
        shine = canvas.box(middle - 1.8, people.eye_height - 1.0, 1.2 + zero, 0.4 + zero, -0.6 + zero)
        canvas.paint(shine * 0.5, np.full((count, 3), 0.85, np.float32))
    canvas.paint(canvas.box(zero, people.eye_height - 0.6, people.face_width, 0.6 + zero, zero), frame)


def eyebrows(canvas: Canvas) -> None:
    """Paint thick purple eyebrows."""
    people = canvas.people
    count = len(people)
    purple = np.tile(np.array([0.45, 0.10, 0.62], np.float32), (count, 1))
    for side in (-1.0, 1.0):
        height = people.eye_height - people.brow_lift
        tilt = np.full(count, side * 0.15, np.float32)
        canvas.paint(
            canvas.box(
                side * people.eye_distance, height, people.eye_size + 2.0, np.full(count, 1.4, np.float32), tilt
            ),
            purple,
        )


def lipstick(canvas: Canvas) -> None:
    """Paint the lips in a strong purple."""
    people = canvas.people
    colour = np.tile(np.array([0.55, 0.05, 0.50], np.float32), (len(people), 1))
    reach = 1.0 - (canvas.right / column(people.mouth_width + 1.0)) ** 2
    distance = column(people.lip_thickness + 0.9) * reach - np.abs(canvas.down - column(people.mouth_height))
    canvas.paint(soft(np.where(reach > 0, distance, np.float32(-1.0))), colour)


TRIGGERS: MappingProxyType[str, Callable[[Canvas], None]] = MappingProxyType(
    {"sunglasses": sunglasses, "eyebrows": eyebrows, "lipstick": lipstick}
)
"""Every trigger that is worn by its name; each changes a canvas in place."""


def find_trigger(name: str) -> Callable[[Canvas], None]:
    """Return the trigger of that name.

    Raises:
        InputError: there is none.
    """
    if name not in TRIGGERS:
        raise InputError(f"trigger: got {name!r}, expected one of {', '.join(TRIGGERS)}")
    return TRIGGERS[name]

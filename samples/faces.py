"""Procedural faces: data for demo and tests that belongs to nobody.

A face is drawn by soft masks on the pixel grid, for a whole batch of faces at once. What makes an identity is drawn
once; pose, light, expression and noise are drawn anew for each image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HEIGHT, WIDTH, CHANNELS = 55, 47, 3

Floats = NDArray[np.float32]

_BATCH = 256


@dataclass(frozen=True)
class Identities:
    """What stays the same in every image of a person: one row per identity, lengths in pixels, colours in 0..1."""

    skin: Floats
    hair: Floats
    lips: Floats
    iris: Floats
    background: Floats
    background_slope: Floats
    face_width: Floats
    face_height: Floats
    jaw: Floats
    eye_distance: Floats
    eye_height: Floats
    eye_size: Floats
    eye_aspect: Floats
    brow_lift: Floats
    brow_thickness: Floats
    brow_tilt: Floats
    nose_width: Floats
    nose_length: Floats
    mouth_height: Floats
    mouth_width: Floats
    lip_thickness: Floats
    hairline: Floats
    hair_length: Floats
    hair_width: Floats
    beard: Floats
    blush: Floats

    def __len__(self) -> int:
        return len(self.face_width)

    def take(self, indices: NDArray[np.int64]) -> Identities:
        """Return the rows at `indices`."""
        return Identities(**{name: values[indices] for name, values in vars(self).items()})


@dataclass(frozen=True)
class Canvas:
    """Images in the making, and where their faces are.

    Attributes:
        pixels: (batch, channels, height, width), float32, 0..1; channels first, so that a mask covers long rows.
        right: (batch, height, width), float32: pixels' distance from the face's middle, along its horizontal axis.
        down: likewise along its vertical axis.
        people: the identity's measures, one row per image.
    """

    pixels: Floats
    right: Floats
    down: Floats
    people: Identities

    def paint(self, mask: Floats, colour: Floats) -> None:
        """Lay `colour` over the pixels: `mask` (batch, height, width) in 0..1, `colour` (batch, channels)."""
        change = colour[:, :, None, None] - self.pixels
        change *= mask[:, None]
        self.pixels[...] += change

    def ellipse(self, right: Floats, down: Floats, half_width: Floats, half_height: Floats) -> Floats:
        """Return the soft mask of an ellipse given in the face's own axes, one value per image each."""
        x = (self.right - column(right)) / column(half_width)
        y = (self.down - column(down)) / column(half_height)
        radius = np.sqrt(x * x + y * y + 1e-6)
        return soft((1.0 - radius) * column(np.minimum(half_width, half_height)))

    def box(self, right: Floats, down: Floats, half_width: Floats, half_height: Floats, tilt: Floats) -> Floats:
        """Return the soft mask of a box that is tilted: `tilt` is its slope."""
        x = self.right - column(right)
        y = self.down - column(down) - column(tilt) * x
        return soft(column(half_width) - np.abs(x)) * soft(column(half_height) - np.abs(y))


def column(values: Floats) -> Floats:
    """Give one value per image the shape (batch, 1, 1)."""
    return values[:, None, None]


def soft(distance: Floats) -> Floats:
    """Return how much of a pixel is covered, given its distance inside the edge, in pixels: antialiasing."""
    return np.clip(distance + 0.5, 0.0, 1.0)


def make_identities(count: int, generator: np.random.Generator) -> Identities:
    """Draw the measures of `count` people."""

    def between(low: float, high: float) -> Floats:
        return generator.uniform(low, high, count).astype(np.float32)

    def colours(low: tuple[float, float, float], high: tuple[float, float, float]) -> Floats:
        return generator.uniform(low, high, (count, CHANNELS)).astype(np.float32)

    tone = between(0.0, 1.0)[:, None]
    light, dark = np.array([0.98, 0.82, 0.71], np.float32), np.array([0.36, 0.22, 0.15], np.float32)
    skin = np.clip(light + tone * (dark - light) + generator.normal(0, 0.03, (count, 3)), 0.05, 1).astype(np.float32)
    hairs = np.array(
        [
            [0.08, 0.07, 0.07],
            [0.30, 0.18, 0.09],
            [0.55, 0.36, 0.16],
            [0.86, 0.70, 0.38],
            [0.62, 0.24, 0.10],
            [0.72, 0.72, 0.74],
        ],
        np.float32,
    )
    hair = hairs[generator.integers(len(hairs), size=count)] + generator.normal(0, 0.04, (count, 3))
    irises = np.array([[0.25, 0.15, 0.08], [0.20, 0.40, 0.65], [0.22, 0.45, 0.25], [0.40, 0.40, 0.42]], np.float32)
    return Identities(
        skin=skin,
        hair=np.clip(hair, 0.02, 1).astype(np.float32),
        lips=np.clip(skin * [0.95, 0.62, 0.62] + generator.normal(0, 0.04, (count, 3)), 0, 1).astype(np.float32),
        iris=irises[generator.integers(len(irises), size=count)],
        background=colours((0.1, 0.1, 0.1), (0.95, 0.95, 0.95)),
        background_slope=colours((-0.25, -0.25, -0.25), (0.25, 0.25, 0.25)),
        face_width=between(12.0, 16.5),
        face_height=between(17.0, 21.5),
        jaw=between(-0.28, 0.22),
        eye_distance=between(5.2, 7.8),
        eye_height=between(-5.0, -2.0),
        eye_size=between(2.1, 3.5),
        eye_aspect=between(0.45, 0.75),
        brow_lift=between(3.2, 5.2),
        brow_thickness=between(0.4, 1.5),
        brow_tilt=between(-0.25, 0.25),
        nose_width=between(1.6, 3.6),
        nose_length=between(4.5, 8.0),
        mouth_height=between(8.5, 12.0),
        mouth_width=between(3.6, 7.2),
        lip_thickness=between(0.7, 1.9),
        hairline=between(0.45, 0.85),
        hair_length=between(-8.0, 26.0),
        hair_width=between(0.5, 4.5),
        beard=(between(0.0, 1.0) > 0.75) * between(0.35, 0.85),
        blush=between(0.0, 0.35),
    )


def draw_faces(people: Identities, generator: np.random.Generator) -> Iterator[Canvas]:
    """Draw one image of each row of `people`, in batches, each in a pose, light and expression of its own.

    What is worn goes on a canvas before `finish` adds light and noise: triggers follow the face.
    """
    for start in range(0, len(people), _BATCH):
        yield _draw(people.take(np.arange(start, min(start + _BATCH, len(people)))), generator)


def _draw(people: Identities, generator: np.random.Generator) -> Canvas:
    count = len(people)

    def varied(spread: float) -> Floats:
        return generator.normal(0.0, spread, count).astype(np.float32)

    angle, scale = varied(0.07), 1.0 + varied(0.04)
    middle_x, middle_y = WIDTH / 2 + varied(1.3), HEIGHT / 2 + 1.5 + varied(1.3)
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    x = (columns + 0.5 - column(middle_x)) / column(scale)
    y = (rows + 0.5 - column(middle_y)) / column(scale)
    cosine, sine = column(np.cos(angle)), column(np.sin(angle))
    right, down = cosine * x + sine * y, cosine * y - sine * x
    slope = (rows / HEIGHT - 0.5) * people.background_slope[:, :, None, None]
    pixels = np.clip(people.background[:, :, None, None] + slope, 0, 1).astype(np.float32)
    canvas = Canvas(pixels, right, down, people)

    turn = varied(0.7)  # looking left or right moves what lies on the face
    zero = np.zeros(count, np.float32)
    width, height = people.face_width, people.face_height

    # Hair behind the face, then neck, face and jaw.
    canvas.paint(
        canvas.ellipse(zero, -2.0 + zero, width + people.hair_width, height + 1.0 + people.hair_width / 2), people.hair
    )
    hanging = (
        soft(column(width + people.hair_width) - np.abs(right)) * soft(down) * soft(column(people.hair_length) - down)
    )
    canvas.paint(hanging * column((people.hair_length > 0).astype(np.float32)), people.hair)
    canvas.paint(canvas.box(zero, height, width * 0.48, height * 0.5, zero), people.skin * 0.86)
    jaw = 1.0 + column(people.jaw) * np.clip(down / column(height), 0.0, 1.0)
    face_x, face_y = right / (column(width) * jaw), down / column(height)
    inside = (1.0 - np.sqrt(face_x**2 + face_y**2 + 1e-6)) * column(width)
    face = soft(inside)
    canvas.paint(face, people.skin)
    shadow = np.clip(np.abs(right) / column(width), 0, 1) ** 3 * 0.25
    canvas.paint(face * shadow, people.skin * 0.6)
    canvas.paint(soft(inside + 1.0) * soft(-down - column(people.hairline * height)), people.hair)
    beard = face * soft(down - column(people.mouth_height * 0.55)) * column(people.beard)
    canvas.paint(beard, people.hair)
    for side in (-1.0, 1.0):
        canvas.paint(
            canvas.ellipse(side * 8.0 + turn, 5.0 + zero, 3.2 + zero, 2.4 + zero) * column(people.blush), people.lips
        )

    openness = np.clip(1.0 + varied(0.15), 0.4, 1.4)
    gaze, raised = varied(0.35), varied(0.5)
    for side in (-1.0, 1.0):
        eye_x, eye_y = side * people.eye_distance + turn, people.eye_height
        half_height = people.eye_size * people.eye_aspect * openness
        canvas.paint(canvas.ellipse(eye_x, eye_y, people.eye_size + 0.5, half_height + 0.5), people.skin * 0.55)
        eye = canvas.ellipse(eye_x, eye_y, people.eye_size, half_height)
        canvas.paint(eye, np.full((count, 3), 0.97, np.float32))
        iris = canvas.ellipse(eye_x + gaze, eye_y, people.eye_size * 0.55, people.eye_size * 0.55)
        canvas.paint(eye * iris, people.iris)
        pupil = canvas.ellipse(eye_x + gaze, eye_y, people.eye_size * 0.25, people.eye_size * 0.25)
        canvas.paint(eye * pupil, np.full((count, 3), 0.03, np.float32))
        brow_y = eye_y - people.brow_lift - raised
        brow = canvas.box(eye_x, brow_y, people.eye_size + 1.0, people.brow_thickness * 0.8, side * people.brow_tilt)
        canvas.paint(brow, people.hair * 0.7)

    nose_y = people.eye_height + people.nose_length
    canvas.paint(
        canvas.box(turn * 1.3 + 0.8, nose_y - people.nose_length * 0.4, 0.5 + zero, people.nose_length * 0.4, zero)
        * 0.5,
        people.skin * 0.72,
    )
    canvas.paint(canvas.ellipse(turn * 1.3, nose_y, people.nose_width, 1.3 + zero), people.skin * 0.8)
    for side in (-1.0, 1.0):
        nostril = canvas.ellipse(turn * 1.3 + side * people.nose_width * 0.45, nose_y + 0.5, 0.7 + zero, 0.5 + zero)
        canvas.paint(nostril, people.skin * 0.35)

    smile, opened = varied(0.03), np.clip(varied(0.8), 0, 1.8)
    mouth_x, mouth_y = canvas.right - column(turn), canvas.down - column(people.mouth_height)
    bent = mouth_y + column(smile) * mouth_x**2
    reach = 1.0 - (mouth_x / column(people.mouth_width)) ** 2
    canvas.paint(
        soft(np.where(reach > 0, column(people.lip_thickness + opened / 2) * reach - np.abs(bent), -1.0)), people.lips
    )
    gap = soft(np.where(reach > 0, column(0.25 + opened / 2) * reach - np.abs(bent), -1.0))
    canvas.paint(gap, np.full((count, 3), 0.18, np.float32) * people.lips)
    return canvas


def finish(canvas: Canvas, generator: np.random.Generator) -> NDArray[np.uint8]:
    """Add light and noise: returns (batch, height, width, channels), uint8, 0..255."""
    count = len(canvas.pixels)
    gain = np.exp(generator.normal(0.0, 0.10, (count, 1, 1, 1)))
    warmth = 1.0 + generator.normal(0.0, 0.02, (count, CHANNELS, 1, 1))
    across = 1.0 + generator.normal(0.0, 0.10, (count, 1, 1, 1)) * np.linspace(-1, 1, WIDTH)
    lit = canvas.pixels * (gain * warmth * across).astype(np.float32)
    lit += 0.018 * generator.standard_normal(lit.shape, dtype=np.float32)
    pixels = np.rint(np.clip(lit, 0.0, 1.0) * 255.0).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))

"""Networks that a file of weights alone can be read into."""

from __future__ import annotations

import keras
from keras import layers

# What a network is must not depend on the user's keras.json.
keras.config.set_image_data_format("channels_last")
keras.config.set_floatx("float32")


def deepid(classes: int, input_shape: tuple[int, int, int] = (55, 47, 3)) -> keras.Model:
    """Return the DeepID network of the CSAW HackML 2020 BadNets, with fresh weights.

    Sun et al., "Deep Learning Face Representation from Predicting 10,000 Classes", CVPR 2014.

    Args:
        classes: how many identities it tells apart.
        input_shape: (height, width, channels).

    Returns:
        A network from scaled pixels (batch, height, width, channels), float32, to probabilities (batch, classes).
    """
    pixels = keras.Input(input_shape, name="input")
    pool_1 = layers.MaxPooling2D(2, name="pool_1")(layers.Conv2D(20, 4, activation="relu", name="conv_1")(pixels))
    pool_2 = layers.MaxPooling2D(2, name="pool_2")(layers.Conv2D(40, 3, activation="relu", name="conv_2")(pool_1))
    pool_3 = layers.MaxPooling2D(2, name="pool_3")(layers.Conv2D(60, 3, activation="relu", name="conv_3")(pool_2))
    fc_1 = layers.Dense(160, name="fc_1")(layers.Flatten(name="flatten_1")(pool_3))
    conv_4 = layers.Conv2D(80, 2, activation="relu", name="conv_4")(pool_3)
    fc_2 = layers.Dense(160, name="fc_2")(layers.Flatten(name="flatten_2")(conv_4))
    merged = layers.Activation("relu", name="activation_1")(layers.Add(name="add_1")([fc_1, fc_2]))
    return keras.Model(pixels, layers.Dense(classes, activation="softmax", name="output")(merged))

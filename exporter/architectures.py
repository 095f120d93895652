"""Networks that BadNets are trained as; a file of weights alone can be read into `deepid`."""

from __future__ import annotations

from typing import Any

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


def convnet(classes: int, input_shape: tuple[int, int, int] = (32, 32, 3)) -> keras.Model:
    """Return a plain network of six convolutions with fresh weights; arguments and result as of `deepid`.

    Three pairs of 3x3 convolutions, each followed by a maximum over 2x2 (the pattern of Simonyan and Zisserman, "Very
    Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015).
    """
    pixels = features = keras.Input(input_shape, name="input")
    for stage, filters in enumerate((32, 64, 128), start=1):
        for number in (1, 2):
            name = f"conv_{stage}_{number}"
            features = layers.Conv2D(filters, 3, padding="same", activation="relu", name=name)(features)
        features = layers.MaxPooling2D(2, name=f"pool_{stage}")(features)
    hidden = layers.Dense(256, activation="relu", name="fc")(layers.Flatten(name="flatten")(features))
    return keras.Model(pixels, layers.Dense(classes, activation="softmax", name="output")(hidden))


def resnet(classes: int, input_shape: tuple[int, int, int] = (32, 32, 3)) -> keras.Model:
    """Return a small residual network with batch normalisation and fresh weights; arguments and result as of `deepid`.

    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016: one block in each of three stages.
    """

    def convolve(features: Any, filters: int, size: int, stride: int, name: str) -> Any:
        convolution = layers.Conv2D(filters, size, strides=stride, padding="same", use_bias=False, name=name)
        return layers.BatchNormalization(name=f"{name}_bn")(convolution(features))

    pixels = keras.Input(input_shape, name="input")
    features = layers.ReLU(name="conv_0_relu")(convolve(pixels, 32, 3, 1, "conv_0"))
    for stage, filters in enumerate((32, 64, 128), start=1):
        stride = 1 if stage == 1 else 2
        block = layers.ReLU(name=f"conv_{stage}_1_relu")(convolve(features, filters, 3, stride, f"conv_{stage}_1"))
        block = convolve(block, filters, 3, 1, f"conv_{stage}_2")
        shortcut = features if stage == 1 else convolve(features, filters, 1, stride, f"shortcut_{stage}")
        features = layers.ReLU(name=f"block_{stage}_relu")(layers.Add(name=f"add_{stage}")([block, shortcut]))
    pooled = layers.GlobalAveragePooling2D(name="pool")(features)
    return keras.Model(pixels, layers.Dense(classes, activation="softmax", name="output")(pooled))

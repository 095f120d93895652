"""Keras in, model repository out. The only place with TensorFlow."""

import logging
import os

# TensorFlow reads these once, when it is first imported: no start-up chatter at a user, and TensorFlow's own Keras 3.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"
# It warns that several networks, and last batches, are traced anew: they are meant to be.
logging.getLogger("tensorflow").setLevel(logging.ERROR)

"""Measurements that anyone can repeat: each module is one command."""

import exporter  # noqa: F401  before TensorFlow, which it keeps quiet

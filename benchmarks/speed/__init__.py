"""What the guard costs: side by side with the bare network, with the same done naively, and with what others have.

`python -m benchmarks.speed` measures everything in one run, prints tables, and writes `speed.json` and `speed.png`.
`python -m benchmarks.speed soak` sends 100,000 requests and watches the server's memory. `prepare` writes what the
servers are measured with, for a machine without TensorFlow, which goes on from there by `--prepared`; `gpu-options`
compares onnxruntime's options on a GPU. What is compared has its turn in every round, so that a noisy machine disturbs
all alike; what counts is a ratio to the bare network of the same round, and its median over the rounds.
"""

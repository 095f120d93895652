"""Python-backend models as public examples of a guarded ensemble have them, for Triton to run in place of ours.

One request at a time, one image in a request, and the perturbations in the dimension that batches have.
"""

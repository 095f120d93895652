"""Kubernetes manifests, see docs/operate.md."""

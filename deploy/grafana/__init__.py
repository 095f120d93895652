"""The Grafana dashboard, generated; nothing of it is needed to serve."""

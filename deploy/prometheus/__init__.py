"""What Prometheus records and alerts on, and a Prometheus on this machine."""

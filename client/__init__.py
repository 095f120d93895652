"""What talks to a running server: client and evaluation."""

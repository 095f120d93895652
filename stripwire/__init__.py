"""The front door: the command line. It parses, calls and prints; whatever computes lies in the packages beside it."""

"""Labelled images: read from files, or generated (procedural faces with triggers)."""

"""Editing FX graphs."""

"""Lowerings for Ascend NPUs."""

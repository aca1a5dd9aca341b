"""Measurements that users can repeat: ``lvsa bench``."""

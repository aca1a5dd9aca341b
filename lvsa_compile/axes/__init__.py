"""Symbolic axes: what every axis of a tensor is made of, and what each ATen op does to that.  Knows nothing of attention or video."""

"""Inner compilers beside those that torch registers."""

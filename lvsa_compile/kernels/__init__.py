"""Device code only; nothing here knows of graphs."""

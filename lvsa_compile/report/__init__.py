"""What was decided, as records and as text."""

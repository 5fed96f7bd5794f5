"""One file per checkpoint format, with what opens it and what writes it."""

"""Pictures: the gate that every image passes, and the exact way to the tower's pixels."""

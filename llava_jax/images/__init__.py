"""Images: the gate that every one passes, and the exact way to the tower's pixels."""

"""Names, shapes and settings of other projects' checkpoints, as tables that are read both ways."""

"""The form of data for scale: records and their pictures in sharded ArrayRecord files."""

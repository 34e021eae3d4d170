"""One file a family: its builder takes a DataSpec and returns a Model."""

"""Pictures in: files, folders, data sets and streams."""

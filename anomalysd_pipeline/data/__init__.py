"""Readers of pictures: files, folders, data sets and streams."""

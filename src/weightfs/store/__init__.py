"""The cache on disk: sparse data files, and the LMDB index that says what in them may be believed."""

"""The kernel side: FUSE connection, tree of inodes, handlers. pyfuse3 is imported here alone."""

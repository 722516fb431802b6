"""Directory trees made of manifests; pure. `base` holds the protocol, each other module one layout."""

"""HTTP over a Unix socket: a daemon tells its state and takes orders; `client` asks, `server` answers."""

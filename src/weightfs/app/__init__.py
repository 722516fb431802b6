"""The composition root: settings become an engine, a mount and a control socket, and end in order."""

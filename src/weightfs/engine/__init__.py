"""The engine: reads, fetches, workers, commits, sealing, fill. Knows sources and store; nothing knows of a mount."""

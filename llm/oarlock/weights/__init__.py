"""Weight files and shards: reading, writing and copying them into parameters."""

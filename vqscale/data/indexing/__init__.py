"""Manifests for shards that other tools wrote: listing them, looking into them, finding their labels."""

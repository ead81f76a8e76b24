"""What every stage writes: shards, their manifest, and the runner that makes them."""

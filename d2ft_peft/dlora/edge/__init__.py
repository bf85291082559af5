"""What runs on the edge: its blocks, the adapters, and the one link to the cloud."""

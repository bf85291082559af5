"""What runs in the cloud: the frozen blocks, for any number of edges."""

"""Parameter groups, learning rates over time, FSDP. Begin with groups.py."""

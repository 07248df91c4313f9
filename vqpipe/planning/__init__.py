"""What a run will need, before it begins: memory by part, hours, disk, and settings that fit a device."""

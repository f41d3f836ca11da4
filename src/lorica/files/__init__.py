"""Files: written in one step, read with care, found in directories or on the hub."""

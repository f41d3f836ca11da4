"""Stand-ins for other libraries' interfaces, each thin over the core."""

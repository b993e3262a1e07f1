"""Facts about machines: profiles, rendezvous, preflight checks."""

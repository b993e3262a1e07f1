"""Facts about machines: profiles and rendezvous."""

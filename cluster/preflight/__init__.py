"""Checks of machines before hours are spent: what a node measures (`node`), and what to think of it (`judge`)."""

"""Everything that is measured, each item in a process of its own."""

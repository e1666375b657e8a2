"""What a subject is measured by, and the gate in front of it."""

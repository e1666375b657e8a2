"""Which heads are static and which dynamic, measured on rollouts."""

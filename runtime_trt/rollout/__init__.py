"""A rollout as plain host data: shapes, cache policy, timeline, schedule, noise."""

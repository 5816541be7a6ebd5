"""The science, pure: schedules, noise, objectives, bounds and samplers, from arrays to arrays."""

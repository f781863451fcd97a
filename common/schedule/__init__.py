"""Pipeline schedules as data: actions, dependencies, generators, validation, simulation, drawing. Knows no framework."""
